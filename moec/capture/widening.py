"""The lengths at which a module is exported: general ones, whatever those of the example are.

torch.export answers a module's questions about a size (is it 1? is it that other size?) by the
example, and the answer stands for every size. So the example is exported at lengths of which
none is 1 and no two are equal for no reason, made by repeating what was given. Which axes are
one size is asked of the module: those that it runs with only together.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any, NamedTuple

import torch
from torch.export import Dim as TorchDim

from moec.capture.call import Call
from moec.capture.shapes import Axes, dim_name
from moec.capture.trials import Trials

BATCH = (2, 3, 5, 7, 11)
SEQUENCE = (16, 12, 20, 28, 36)
SHORT = (3, 2, 4, 5, 6)
"""Lengths of a first axis, of another axis, and of one that may not be long."""

AUTO, DYNAMIC = TorchDim.AUTO, TorchDim.DYNAMIC
FIXED = "fixed"
MOST_ASSIGNMENTS = 64
MOST_IN_ALL_SUBSETS = 5


class Axis(NamedTuple):
    """Axis number `axis` of tensor number `tensor`."""

    tensor: int
    axis: int


@dataclass(frozen=True)
class Group:
    """Axes that are one size, of `length` in the tensors that are exported.

    `limits` are the least and greatest length that the user allows; `name` is the user's for
    axes that the user tied together.
    """

    axes: tuple[Axis, ...]
    length: int
    limits: tuple[int, int | None] = (0, None)
    name: str = ""

    def allows(self, length: int) -> bool:
        low, high = self.limits
        return low <= length and (high is None or length <= high)


@dataclass(frozen=True)
class Widened:
    """The tensors to export, which axes are one size in them, and what is fixed.

    `groups` hold every axis that may vary; `single` are those of length 1 in the example;
    `fixed` are the axes of length 1 that the module does not run with at another length.
    """

    tensors: tuple[torch.Tensor, ...]
    wishes: tuple[Axes, ...]
    groups: tuple[Group, ...]
    single: tuple[Group, ...] = ()
    fixed: tuple[Axis, ...] = ()


def widen(call: Call, wishes: Sequence[Axes], static: Collection[Axis] = ()) -> Widened:
    """`call`'s example at general lengths; the axes in `static` keep their length of 1.

    An axis of length 1 becomes longer, axes that belong together at once. Axes of equal length
    become one group, unless the module runs with either of them the longer.
    """
    example = call.tensors
    groups, singles = _grouped(example, wishes, static)
    search = _Search(Trials(call), example, _sizes_of_weights(call))
    groups, fixed = search.lengthen(groups, singles)
    groups = search.distinct(search.split(groups))
    gone = {*fixed, *static}
    return Widened(
        search.resized(groups),
        tuple(
            {axis: dim for axis, dim in wish.items() if (place, axis) not in gone}
            for place, wish in enumerate(wishes)
        ),
        groups,
        tuple(g for g in groups if any(example[t].shape[a] == 1 for t, a in g.axes)),
        fixed,
    )


def _grouped(
    example: Sequence[torch.Tensor], wishes: Sequence[Axes], static: Collection[Axis]
) -> tuple[tuple[Group, ...], tuple[Axis, ...]]:
    """The axes of one name, and those of one length; and those of length 1 without a name."""
    members: dict[Any, list[Axis]] = {}
    singles = []
    tied = {dim_name(getattr(d, "root", None)) for wish in wishes for d in wish.values()} - {None}
    for place, wish in enumerate(wishes):
        for number, dim in wish.items():
            axis, name = Axis(place, number), dim_name(dim)
            length = example[place].shape[number]
            if axis in static or name in tied or not _varies(dim):
                continue
            if name is None and length == 1:
                singles.append(axis)
            else:
                members.setdefault(name or length, []).append(axis)
    groups = tuple(
        Group(
            tuple(axes),
            example[axes[0].tensor].shape[axes[0].axis],
            _limits(wishes[axes[0].tensor][axes[0].axis]),
            key if isinstance(key, str) else "",
        )
        for key, axes in members.items()
    )
    return groups, tuple(singles)


def _varies(dim: Any) -> bool:
    """Whether the length of the axis may be chosen here: not where it is a number, or made from
    another size (2 * S), which stays as the example has it."""
    return dim_name(dim) is not None or getattr(dim, "type", None) in (AUTO.type, DYNAMIC.type)


def _limits(dim: Any) -> tuple[int, int | None]:
    low, high = getattr(dim, "min", None), getattr(dim, "max", None)
    return (
        low if isinstance(low, int) else 0,
        high if isinstance(high, int) and high < 2**62 else None,
    )


def _sizes_of_weights(call: Call) -> frozenset[int]:
    return frozenset(s for t in chain(call.parameters(), call.buffers()) for s in t.shape)


@dataclass(frozen=True)
class _Search:
    """The questions to the module, all of which are runs on resized examples.

    Lengths that are sizes of its weights (`common`) come last, since a module may compare them.
    """

    trials: Trials
    example: Sequence[torch.Tensor]
    common: frozenset[int]

    def resized(self, groups: Sequence[Group]) -> tuple[torch.Tensor, ...]:
        lengths: list[dict[int, int]] = [{} for _ in self.example]
        for group in groups:
            for tensor, axis in group.axes:
                lengths[tensor][axis] = group.length
        return tuple(map(resize, self.example, lengths))

    def runs(self, *groups: Group) -> bool:
        return self.trials.runs(self.resized(groups))

    def length(self, group: Group, used: Collection[int], lengths: Sequence[int]) -> int | None:
        """The first length that the user allows and no other group has."""
        allowed = [n for n in lengths if n not in used and group.allows(n)]
        return min(allowed, key=self.common.__contains__, default=None)

    def lengthen(
        self, groups: Sequence[Group], singles: Sequence[Axis]
    ) -> tuple[tuple[Group, ...], tuple[Axis, ...]]:
        """The groups with the axes of length 1 among them, and which of those cannot be longer.

        Tried first: axes of one position are one size. Then those of other positions too, and
        that fewer of them vary.
        """
        long = tuple(group for group in groups if group.length != 1)
        named = tuple(group for group in groups if group.length == 1)
        units = (*named, *(Group((axis,), 1) for axis in singles))
        for labels in _assignments(units):
            for short in (False, True):
                made = self._labelled(long, units, labels, short)
                if made is not None and self.runs(*made):
                    fixed = {
                        a
                        for u, key in zip(units, labels, strict=True)
                        if key == FIXED
                        for a in u.axes
                    }
                    return self._alone(made, [u for u in units if set(u.axes) <= fixed])
        return long, tuple(axis for unit in units for axis in unit.axes)

    def _labelled(
        self, long: Sequence[Group], units: Sequence[Group], labels: Sequence[Any], short: bool
    ) -> tuple[Group, ...] | None:
        """`long` and one group for each label, at lengths of their own; None if there is none."""
        made = list(long)
        for label in dict.fromkeys(labels):
            if label == FIXED:
                continue
            own = [unit for unit, key in zip(units, labels, strict=True) if key == label]
            group = replace(own[0], axes=tuple(axis for unit in own for axis in unit.axes))
            longer = self._longer(group, made, short)
            if longer is None:
                return None
            made.append(longer)
        return tuple(made)

    def _longer(self, group: Group, others: Sequence[Group], short: bool) -> Group | None:
        pool = SHORT if short else BATCH if group.axes[0].axis == 0 else SEQUENCE
        length = self.length(group, {other.length for other in others}, pool)
        return None if length is None else replace(group, length=length)

    def _alone(
        self, groups: tuple[Group, ...], units: Sequence[Group]
    ) -> tuple[tuple[Group, ...], tuple[Axis, ...]]:
        """Units that do not belong to one of their position may still be sizes of their own."""
        fixed: list[Axis] = []
        for unit in units:
            longer = self._longer(unit, groups, short=True)
            if longer is not None and self.runs(*groups, longer):
                groups = (*groups, longer)
            else:
                fixed += unit.axes
        return groups, tuple(fixed)

    def split(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        """Each group whose parts may differ in length is one group a part."""
        done: list[Group] = []
        waiting = list(groups)
        while waiting:
            group = waiting.pop(0)
            parts = self._parts(group, [*done, *waiting])
            if parts:
                waiting = [*parts, *waiting]
            else:
                done.append(group)
        return tuple(done)

    def _parts(self, group: Group, others: Sequence[Group]) -> tuple[Group, ...]:
        if len(group.axes) < 2 or group.name or not group.length:
            return ()
        used = {other.length for other in others}
        lengths = [n for n in _other_lengths(group.length) if n not in used and group.allows(n)]
        other = next((n for n in lengths if self.runs(*others, replace(group, length=n))), None)
        if other is None:  # equal by chance, and some of them cannot change
            return tuple(replace(group, axes=(axis,)) for axis in group.axes)
        for axes in _subsets(group.axes):
            part = replace(group, axes=axes)
            rest = replace(group, axes=tuple(axis for axis in group.axes if axis not in axes))
            moved, still = replace(part, length=other), replace(rest, length=other)
            if self.runs(*others, moved, rest) and self.runs(*others, part, still):
                return rest, moved
        return ()

    def distinct(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        """The groups at different lengths, as far as the module runs so."""
        done: list[Group] = []
        for place, group in enumerate(groups):
            rest = groups[place + 1 :]
            used = {other.length for other in (*done, *rest)}
            if group.length in {other.length for other in done}:
                for length in _other_lengths(group.length):
                    moved = replace(group, length=length)
                    if length not in used and group.allows(length):
                        if self.runs(*done, moved, *rest):
                            group = moved
                            break
            done.append(group)
        return tuple(done)


def _other_lengths(length: int) -> tuple[int, ...]:
    """Multiples first: a module may cut an axis into pieces. Then less, where that is the most."""
    shorter = (length // 2, length - 1) if length > 3 else ()
    return (2 * length, 3 * length, length + 1, *shorter)


def _assignments(units: Sequence[Group]) -> Iterator[tuple[Any, ...]]:
    """A label for each unit, the plausible first: its name or position, that of another, FIXED."""
    positions = sorted({unit.axes[0].axis for unit in units if not unit.name})
    options = []
    for unit in units:
        others = [p for p in positions if p != unit.axes[0].axis] if not unit.name else []
        own = unit.name or unit.axes[0].axis
        options.append([(0, own), *((1, p) for p in others), (2, FIXED)])
    first = (0,) * len(units)
    heap, met = [(0, first)], {first}
    for _ in range(MOST_ASSIGNMENTS):
        if not heap or not units:
            return
        _, chosen = heapq.heappop(heap)
        yield tuple(options[i][c][1] for i, c in enumerate(chosen))
        for i, c in enumerate(chosen):
            more = (*chosen[:i], c + 1, *chosen[i + 1 :])
            if c + 1 < len(options[i]) and more not in met:
                met.add(more)
                heapq.heappush(heap, (sum(options[j][k][0] for j, k in enumerate(more)), more))


def _subsets(axes: tuple[Axis, ...]) -> Iterator[tuple[Axis, ...]]:
    """Parts of the axes, each without what is left: all of them, or of many the contiguous."""
    count = len(axes)
    if count <= MOST_IN_ALL_SUBSETS:
        for size in range(1, count // 2 + 1):
            for part in combinations(axes, size):
                if 2 * size < count or axes[0] in part:
                    yield part
        return
    yield from ((axis,) for axis in axes)
    yield from (axes[:end] for end in range(2, count - 1))


def resize(tensor: torch.Tensor, lengths: Mapping[int, int]) -> torch.Tensor:
    """`tensor` repeated and cut to the given lengths of its axes; an empty axis stays empty."""
    for axis, length in lengths.items():
        if length != tensor.shape[axis] and tensor.shape[axis]:
            index = torch.arange(length, device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor
