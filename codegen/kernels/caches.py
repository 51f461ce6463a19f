"""Caches of keys and values, which live between calls and are written in place."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.cpu.append import AppendSpec, append
from moec.codegen.kernels.table import VECTOR_DTYPES, kernel
from moec.codegen.lowering import Lowering
from moec.ir import Graph, Op


def _fits(op: Op, graph: Graph) -> bool:
    """Nobody else may read what is written over: the cache is a state, and read here alone."""
    cache = op.inputs[0]
    owned = any(state.before is cache for state in graph.states)
    return owned and len(graph.readers[cache]) == 1 and cache.dtype in VECTOR_DTYPES


@kernel("nn.append", takes=_fits)
def _append(low: Lowering, op: Op) -> list[relax.Expr]:
    cache = op.inputs[0]
    _, heads, _, width = cache.shape
    tokens_first = bool(op.attrs.get("tokens_first"))
    spec = AppendSpec(cache.dtype, cast(int, heads), cast(int, width), tokens_first)
    function = low.function(spec, "append", lambda name: append(spec, low.target, name))
    low.note(op, "append")
    arguments = [low.value(value) for value in op.inputs]
    return [low.in_place(function, arguments, op.outputs[0].type)]
