"""The ATen ops that act on each element alone: what an epilogue of a kernel may hold."""

from __future__ import annotations

from moec.ir.graph import Op, Value

UNARY = frozenset(
    f"aten.{name}.default"
    for name in (
        "abs cos exp erf gelu hardsigmoid hardswish hardtanh leaky_relu log mish neg reciprocal "
        "relu relu6 rsqrt sigmoid silu sin softplus sqrt tanh elu clamp clamp_min clamp_max"
    ).split()
)
BINARY = frozenset(f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div", "rsub"))
SCALAR = frozenset(
    {
        "aten.pow.Tensor_Scalar",
        "aten.add.Scalar",
        "aten.sub.Scalar",
        "aten.mul.Scalar",
        "aten.div.Scalar",
        "aten.rsub.Scalar",
        "aten.maximum.default",
        "aten.minimum.default",
        "aten._to_copy.default",
    }
)
POINTWISE = UNARY | BINARY | SCALAR


def is_pointwise(op: Op) -> bool:
    """Whether each element of the one result depends on the same element of the inputs alone."""
    return op.name in POINTWISE and len(op.outputs) == 1 and op.body is None


def same_shape(op: Op, value: Value) -> bool:
    return all(v.shape == value.shape for v in op.inputs)
