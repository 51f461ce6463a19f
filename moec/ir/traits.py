"""Traits of ATen ops: views, casts, element-wise ops, products. Passes derive their sets from here.

Torch tags its pointwise operators; the few that it does not tag are listed here. The ops of moec
have their traits in their definition (moec.ir.opdef).
"""

from __future__ import annotations

from functools import cache

import torch

from moec.dtypes import FLOATS
from moec.errors import IRError
from moec.ir.aten import overload
from moec.ir.graph import Op

VIEWS = frozenset(
    {
        "aten.reshape.default",
        "aten.view.default",
        "aten._unsafe_view.default",
        "aten.squeeze.dims",
        "aten.squeeze.dim",
        "aten.squeeze.default",
        "aten.unsqueeze.default",
        "aten.clone.default",
        "aten.alias.default",
        "aten.detach.default",
    }
)
"""Ops that keep the elements and their row-major order."""

IDENTITIES = frozenset(
    {
        "aten.alias.default",
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.detach.default",
        "aten.detach_.default",
        "aten.lift_fresh_copy.default",
    }
)
"""Ops whose result equals their input, shape and dtype included."""

CASTS = frozenset({"aten._to_copy.default", "aten.to.dtype"})


def rounds_doubles(op: Op) -> bool:
    """Whether a cast is between float64 and other floats. What is computed on the two sides of it
    differs by less than proofs in float32 tell, so that no match may leave it out."""
    if op.name not in CASTS:
        return False
    types = (op.inputs[0].dtype, op.outputs[0].dtype)
    return types.count("f64") == 1 and all(dtype in FLOATS for dtype in types)


THROUGH = VIEWS | CASTS | {"aten.expand.default", "aten.permute.default"}
"""Ops whose output holds the elements of their input: repeated, permuted or cast."""

LIKES = {
    "aten.full_like.default": None,
    "aten.zeros_like.default": 0,
    "aten.ones_like.default": 1,
    "aten.empty_like.default": 0,
}
"""Ops that read only the shape of their input, and the number they fill it with (None: the
attribute `fill_value`)."""

PRODUCTS = {
    "aten.linear.default": 0,
    "aten.mm.default": 0,
    "aten.bmm.default": 0,
    "aten.matmul.default": 0,
    "aten.addmm.default": 1,
    "aten.baddbmm.default": 1,
}
"""Matrix products, with the index of the left operand among the inputs."""

CHOICES = frozenset(
    {
        "aten.topk.default",
        "aten.argmax.default",
        "aten.max.dim",
        "aten.sort.default",
        "aten.sort.stable",
    }
)
"""Ops that choose the best of some scores."""

_UNTAGGED = frozenset(
    f"aten.{name}"
    for name in (
        "_to_copy.default alias.default copy.default floor_divide.Scalar floor_divide.default "
        "hardswish.default masked_fill.Tensor rsub.Tensor where.Scalar where.ScalarOther "
        "where.ScalarSelf"
    ).split()
)
"""Pointwise operators that torch does not tag."""

_UNINITIALISED = ("empty", "new_empty")


@cache
def is_elementwise(name: str) -> bool:
    """Whether an element of an ATen op's results depends only on the elements at its position,
    after broadcasting, and on no random numbers."""
    if name in _UNTAGGED:
        return True
    tags = _tags(name)
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


@cache
def is_reproducible(name: str) -> bool:
    """Whether an op has the same results for the same inputs: it is not random, and its results
    are initialised."""
    kind = name.split(".")[1]
    return torch.Tag.nondeterministic_seeded not in _tags(name) and not kind.startswith(
        _UNINITIALISED
    )


def _tags(name: str) -> list[torch.Tag]:
    try:
        return list(overload(name).tags) if name.startswith("aten.") else []
    except IRError:
        return []


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
"""The element-wise ops that the epilogue of a kernel may hold."""


def is_pointwise(op: Op) -> bool:
    """Whether the op has one result, each element of which depends on the same element of the
    inputs only."""
    return op.name in POINTWISE and len(op.outputs) == 1 and op.body is None
