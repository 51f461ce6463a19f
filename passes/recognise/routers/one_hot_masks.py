"""Whether a mask has at most one set element along an axis, by the ops that compute it.

A comparison of one id with a range of numbers does, and so does what only clears elements of it. A
threshold on scores does not, however rarely two of them pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import product
from moec.ir.traits import CASTS, VIEWS
from moec.passes.recognise.reading.opnames import ZEROS
from moec.passes.recognise.region import Scope

_RANGES = ("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
_CLEARING = ("mul.Tensor", "logical_and.default", "bitwise_and.Tensor", "minimum.default")
_POSITIVE = ("gt.Scalar", "ne.Scalar", "relu.default", "abs.default", "mul.Scalar", "clone.default")
"""Ops that give zero for zero; the comparisons if they compare with 0 or, for gt, more."""


def at_most_one(scope: Scope, value: Value, axis: int = -1) -> bool:
    """Whether at most one element along `axis` is not zero, for all inputs."""
    op = scope.maker(value)
    if op is None:
        return False
    axis %= len(value.shape)
    name = op.name.removeprefix("aten.")
    if name == "eq.Tensor":
        return _compares(scope, op, axis)
    if op.name in CASTS or (name in _POSITIVE and _keeps_zero(op)):
        return at_most_one(scope, op.inputs[0], axis)
    if name in _CLEARING:
        return any(_along(scope, operand, value, axis) for operand in op.inputs)
    if name == "where.self":
        return _where(scope, op, axis)
    if name == "masked_fill.Scalar":
        return op.attrs.get("value") in (0, False) and _along(scope, op.inputs[0], value, axis)
    if name in ("scatter.value", "scatter.src"):
        one = (
            op.inputs[1].shape[axis] == 1 and cast(int, op.attrs["dim"]) % len(value.shape) == axis
        )
        return one and _zeros(scope, op.inputs[0])
    if name == "permute.default":
        return at_most_one(scope, op.inputs[0], cast("tuple[int, ...]", op.attrs["dims"])[axis])
    source = _axis_before(op, axis) if op.inputs else None
    return source is not None and at_most_one(scope, op.inputs[0], source)


def _compares(scope: Scope, op: Op, axis: int) -> bool:
    """Whether an eq compares one number along the axis with different numbers."""
    rank = len(op.outputs[0].shape)
    for numbers, ids in (op.inputs, op.inputs[::-1]):
        if _size(numbers, axis - rank) != 1 and _size(ids, axis - rank) == 1:
            return _are_different(scope, numbers)
    return False


def _are_different(scope: Scope, numbers: Value) -> bool:
    source = scope.behind_casts(numbers)
    content = scope.content(source)
    if content is not None:
        return len(set(content.flatten().tolist())) == content.numel()
    return scope.made_by(source, *_RANGES) is not None


def _where(scope: Scope, op: Op, axis: int) -> bool:
    """Whether a choice between two values has at most one element of either."""
    condition, first, second = op.inputs
    output = op.outputs[0]
    if _zeros(scope, second):
        return any(_along(scope, operand, output, axis) for operand in (condition, first))
    if _zeros(scope, first):
        return _along(scope, second, output, axis)
    one_side = _size(condition, axis - len(output.shape)) == 1
    return one_side and all(_along(scope, side, output, axis) for side in (first, second))


def _along(scope: Scope, operand: Value, output: Value, axis: int) -> bool:
    """Whether a broadcast operand of `output` has at most one element along its axis."""
    position = axis - len(output.shape)
    return _size(operand, position) == output.shape[axis] and at_most_one(scope, operand, position)


def _keeps_zero(op: Op) -> bool:
    if op.name == "aten.gt.Scalar":
        return cast(float, op.attrs["other"]) >= 0
    return op.name != "aten.ne.Scalar" or op.attrs["other"] in (0, False)


def _axis_before(op: Op, axis: int) -> int | None:
    """The axis of the source whose elements `axis` has, for views and parts; None for other ops."""
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if op.name in VIEWS:
        return _same_place(before, after, axis)
    if op.name == "aten.slice.Tensor":
        return axis
    if op.name == "aten.select.int":
        return axis + (axis >= cast(int, op.attrs["dim"]) % len(before))
    return None


def _same_place(before: Sequence[object], after: Sequence[object], axis: int) -> int | None:
    """The axis of `before` of the same size, with as many elements behind it."""
    behind = product(after[axis + 1 :])  # type: ignore[arg-type]
    for source, size in enumerate(before):
        if size == after[axis] and product(before[source + 1 :]) == behind:  # type: ignore[arg-type]
            return source
    return None


def _size(value: Value, position: int) -> object:
    """The size of an axis counted from the end; 1 where a value has fewer axes."""
    return value.shape[position] if -position <= len(value.shape) else 1


def _zeros(scope: Scope, value: Value) -> bool:
    op = scope.made_by(scope.behind_casts(value), *ZEROS, "aten.scalar_tensor.default")
    if op is None:
        return False
    return op.attrs.get("fill_value", op.attrs.get("s", 0)) in (0, 0.0, False)
