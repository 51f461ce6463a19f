"""Groups of axes that vary together, and tensors resized to other lengths of these axes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.export import Dim as TorchDim

from moec.capture.sizes.wishes import Axes, dim_name
from moec.ir.interpret.resized import resize_axis

BATCH = (2, 3, 5, 7, 11)
SEQUENCE = (16, 12, 20, 28, 36)
SHORT = (3, 2, 4, 5, 6)
"""Lengths to try for a first axis, for another axis, and for an axis that must be short."""

LONG = 64


class Axis(NamedTuple):
    """Axis number `axis` of tensor number `tensor`."""

    tensor: int
    axis: int


@dataclass(frozen=True)
class AxisGroup:
    """Axes that always have one size, with the `length` that they are exported at.

    `limits` are the least and greatest length that the user allows; `name` is the user's name for
    axes that the user tied together.
    """

    axes: tuple[Axis, ...]
    length: int
    limits: tuple[int, int | None] = (0, None)
    name: str = ""

    def allows(self, length: int) -> bool:
        low, high = self.limits
        return low <= length and (high is None or length <= high)


def groups_and_units(
    example: Sequence[torch.Tensor], wishes: Sequence[Axes], joining: Collection[Axis]
) -> tuple[tuple[AxisGroup, ...], tuple[AxisGroup, ...]]:
    """(groups, units): the axes longer than 1 that may vary, grouped by name or else by length; and
    the axes of length 1, grouped by name or else one axis a group.

    A group whose axes are all in `joining` is left out.
    """
    members: dict[Any, list[Axis]] = {}
    units: dict[Any, list[Axis]] = {}
    tied = {dim_name(getattr(d, "root", None)) for wish in wishes for d in wish.values()} - {None}
    for index, wish in enumerate(wishes):
        for number, dim in wish.items():
            axis, name = Axis(index, number), dim_name(dim)
            if name in tied or not _varies(dim):
                continue
            length = example[index].shape[number]
            if length == 1:
                units.setdefault(name or axis, []).append(axis)
            else:
                members.setdefault(name or length, []).append(axis)

    def group(key: Any, axes: Sequence[Axis]) -> AxisGroup:
        first = axes[0]
        length = example[first.tensor].shape[first.axis]
        limits = _limits(wishes[first.tensor][first.axis])
        return AxisGroup(tuple(axes), length, limits, key if isinstance(key, str) else "")

    return (
        tuple(group(key, axes) for key, axes in members.items() if not set(axes) <= set(joining)),
        tuple(group(key, axes) for key, axes in units.items()),
    )


def _varies(dim: Any) -> bool:
    """Whether the length of the axis can be chosen freely: not where it is a constant or an
    expression of another size (2 * S)."""
    hints = (TorchDim.AUTO.type, TorchDim.DYNAMIC.type)
    return dim_name(dim) is not None or getattr(dim, "type", None) in hints


def _limits(dim: Any) -> tuple[int, int | None]:
    low, high = getattr(dim, "min", None), getattr(dim, "max", None)
    return (
        low if isinstance(low, int) else 0,
        high if isinstance(high, int) and high < 2**62 else None,
    )


def longer_than_one(group: AxisGroup, short: bool) -> tuple[int, ...]:
    """Candidate lengths for a group of length 1."""
    return SHORT if short else BATCH if group.axes[0].axis == 0 else SEQUENCE


def other_lengths(length: int) -> tuple[int, ...]:
    """Candidate lengths other than `length`. Multiples come first, since a module may split the
    axis into equal parts; for a long axis, half of it comes first."""
    if length > LONG:
        return (length // 2, length - 1, 2 * length, length + 1)
    shorter = (length // 2, length - 1) if length > 3 else ()
    return (2 * length, 3 * length, length + 1, *shorter)


def resized(
    tensors: Sequence[torch.Tensor], groups: Sequence[AxisGroup]
) -> tuple[torch.Tensor, ...]:
    """The tensors with the axes of each group resized to the group's length."""
    lengths: list[dict[int, int]] = [{} for _ in tensors]
    for group in groups:
        for axis in group.axes:
            lengths[axis.tensor][axis.axis] = group.length
    return tuple(map(resize, tensors, lengths))


def resize(tensor: torch.Tensor, lengths: Mapping[int, int]) -> torch.Tensor:
    """`tensor` repeated and cut to the given length of each axis (`resize_axis`)."""
    for axis, length in lengths.items():
        tensor = resize_axis(tensor, axis, length)
    return tensor
