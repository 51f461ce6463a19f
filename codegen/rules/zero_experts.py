"""Experts without a network of their own."""

from __future__ import annotations

from tvm import relax

from moec.codegen.cpu.routing.zero_experts import ZeroSpec, zero_experts
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.table import VECTOR_DTYPES, kernel
from moec.ir.graph import Graph, Op
from moec.ops.zero_experts import ZeroExperts


def fits(op: Op, graph: Graph) -> bool:
    parts = ZeroExperts.of(op)
    floats = [v for v in op.inputs if v is not parts.experts]
    return parts.experts.dtype == "i64" and all(v.dtype in VECTOR_DTYPES for v in floats)


@kernel("moe.zero_experts", takes=fits)
def _zero_experts(low: Lowering, op: Op) -> list[relax.Expr]:
    parts, out = ZeroExperts.of(op), op.outputs[0]
    top_k, width = parts.experts.shape[1], parts.x.shape[1]
    assert isinstance(top_k, int)
    assert isinstance(width, int)
    kinds = [
        None if v is None else sc.STORED[v.dtype]
        for v in (parts.weights, parts.mix, parts.constants, parts.addend)
    ]
    spec = ZeroSpec(
        parts.first,
        parts.kinds,
        top_k,
        width,
        sc.STORED[parts.x.dtype],
        sc.STORED[out.dtype],
        *kinds,
    )
    function = low.function(spec, "zero_experts", lambda name: zero_experts(low.target, spec, name))
    low.note(op, "zero_experts")
    return low.call(function, [low.value(v) for v in op.inputs], [out.type])
