"""Attention without a softmax, whose state is carried over time."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.cpu.attention.linear_attention import LinearAttentionSpec, linear_attention
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.table import kernel
from moec.ir.graph import Op
from moec.ops.linear_attention import LinearAttention


def _spec(op: Op) -> LinearAttentionSpec | None:
    a = LinearAttention.of(op)
    fixed = (*a.k.shape[2:3], *a.v.shape[2:3], a.k.shape[3], a.v.shape[3])
    if not all(isinstance(d, int) and d > 0 for d in fixed):
        return None
    shared, heads, width, features = cast("tuple[int, ...]", fixed)
    delta, started = a.beta is not None, a.start is not None
    return LinearAttentionSpec(shared, heads, width, features, a.per, delta, started)


@kernel("nn.linear_attention", takes=lambda op, graph: _spec(op) is not None)
def _linear_attention(low: Lowering, op: Op) -> list[relax.Expr]:
    spec = cast(LinearAttentionSpec, _spec(op))
    name = "linear_attention"
    function = low.function(spec, name, lambda name: linear_attention(spec, low.target, name))
    low.note(op, name)
    return low.call(function, [low.value(v) for v in op.inputs], [v.type for v in op.outputs])
