"""Linear attention: attention without a softmax, with a recurrent state."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.module_builder import Lowering
from moec.codegen.specs.attention import LinearAttentionSpec
from moec.ir.graph import Graph, Op
from moec.ir.ops.dense.linear_attention import LinearAttention


def _spec(op: Op) -> LinearAttentionSpec:
    """The spec of a linear attention. Raises NoMatch if the kernel does not support it."""
    a = LinearAttention.of(op)
    fixed = (*a.k.shape[2:3], *a.v.shape[2:3], a.k.shape[3], a.v.shape[3])
    sized = all(isinstance(d, int) and d > 0 for d in fixed)
    require(sized, "the number or the width of its heads is not constant")
    shared, heads, width, features = cast("tuple[int, ...]", fixed)
    delta, started = a.beta is not None, a.start is not None
    return LinearAttentionSpec(shared, heads, width, features, a.per, delta, started)


def _check(op: Op, graph: Graph) -> None:
    _spec(op)


def _linear_attention(low: Lowering, op: Op) -> list[relax.Expr]:
    spec = _spec(op)
    name = "linear_attention"
    function = low.kernel(spec, name)
    low.note(op, name)
    return low.call(function, [low.value(v) for v in op.inputs], [v.type for v in op.outputs])


RULES = (Rule("linear_attention", ("nn.linear_attention",), _check, _linear_attention),)
