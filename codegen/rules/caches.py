"""Caches of keys and values, which persist between calls and are written in place."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.module_builder import Lowering
from moec.codegen.specs.attention import AnglesSpec, AppendSpec
from moec.dtypes import VECTOR_DTYPES
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.dense.attention import Append


def _check(op: Op, graph: Graph) -> None:
    """Raises NoMatch unless the cache is a state that only this op reads: it is overwritten."""
    a = Append.of(op)
    require(
        any(state.before is a.cache for state in graph.states),
        "its cache is not a state of the model",
    )
    require(len(graph.readers[a.cache]) == 1, "another op reads the cache before the update")
    dtypes = sorted({v.dtype for v in a.inputs if v is not a.first} - set(VECTOR_DTYPES))
    require(not dtypes, f"it stores {', '.join(dtypes)}")


def _append(low: Lowering, op: Op) -> list[relax.Expr]:
    a = Append.of(op)
    _, heads, _, width = a.cache.shape
    turns = None if a.cos is None or a.sin is None else (_angles(a.cos), _angles(a.sin))
    spec = AppendSpec(a.cache.dtype, cast(int, heads), cast(int, width), a.tokens_first, turns)
    name = "append" if turns is None else "turn_append"
    function = low.kernel(spec, name)
    low.note(op, name)
    arguments = [low.value(value) for value in a.inputs]
    return [low.in_place(function, arguments, op.outputs[0].type)]


def _angles(value: Value) -> AnglesSpec:
    batch, heads, tokens = (dim != 1 for dim in value.shape[:3])
    return AnglesSpec(value.dtype, (batch, heads, tokens), cast(int, value.shape[3]))


RULES = (Rule("append", ("nn.append",), _check, _append),)
