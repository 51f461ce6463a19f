"""Chooses the lengths at which a module is exported, so that the export holds for all lengths.

torch.export evaluates conditions on sizes (is it 1? does it equal that size?) with the example, and
the outcome then applies to every size. So the example is resized, by repeating its elements, until
no length is 1 and no two lengths are equal by coincidence. Axes share a size where the module runs
only if they change together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice, product

import torch

from moec.capture.calls.call import ModuleCall
from moec.capture.calls.trials import Trials
from moec.capture.sizes.axis_groups import (
    Axis,
    AxisGroup,
    groups_and_units,
    longer_than_one,
    other_lengths,
    resized,
)
from moec.capture.sizes.wishes import Axes
from moec.errors import CaptureError
from moec.ir.graph import Program, Value
from moec.ir.sizes.dims import parse_dim, symbols
from moec.ir.sizes.thresholds import violated
from moec.oracle.agree import agree, sizes_of
from moec.oracle.cases import Eager

FIXED = "fixed"
MOST_ASSIGNMENTS = 64
MOST_IN_ALL_SUBSETS = 5


@dataclass(frozen=True)
class Search:
    """Runs a call on its example resized, to find out which axes may vary.

    Lengths in `common`, which other axes have (of weights above all), are tried last, since a
    module may compare sizes with them. `joining` and `refuted` are those of
    `moec.capture.sizes.widen.widen`.
    """

    trials: Trials
    example: Sequence[torch.Tensor]
    common: frozenset[int]
    joining: frozenset[Axis]
    refuted: frozenset[frozenset[Axis]]

    def runs(self, *groups: AxisGroup) -> bool:
        return self.trials.runs(resized(self.example, groups))

    def groups(
        self, long: Sequence[AxisGroup], units: Sequence[AxisGroup]
    ) -> tuple[AxisGroup, ...]:
        """The axes that vary, grouped by size, at lengths at which the call runs.

        `units` are the axes of length 1. The first attempt gives all first axes one size and all
        others another; then single axes change sides, and then fewer of them vary.
        """
        for assignment in self._running(long, units):
            groups = self._distinct(self._joined(self._split(assignment)))
            if any(self._refuted(group) and self._length(group) == 1 for group in groups):
                continue
            if self.runs(*groups):
                return groups
        return self._distinct(self._joined(self._split(long)))

    def _refuted(self, group: AxisGroup) -> bool:
        return frozenset(group.axes) in self.refuted

    def _length(self, group: AxisGroup) -> int:
        """The length of a group in the example."""
        return self.example[group.axes[0].tensor].shape[group.axes[0].axis]

    def _running(
        self, long: Sequence[AxisGroup], units: Sequence[AxisGroup]
    ) -> Iterator[tuple[AxisGroup, ...]]:
        """For each assignment that runs: the groups, extended by the axes of length 1 at new
        lengths."""
        assignments = _assignments(units, self.joining) if units else ()
        for labels in islice(assignments, MOST_ASSIGNMENTS):
            for short in (False, True):
                groups = self._labelled(long, units, labels, short)
                if groups is not None and self.runs(*groups):
                    fixed = [u for u, key in zip(units, labels, strict=True) if key == FIXED]
                    yield self._with_lone(groups, fixed)
                    break

    def _labelled(
        self,
        long: Sequence[AxisGroup],
        units: Sequence[AxisGroup],
        labels: Sequence[str],
        short: bool,
    ) -> tuple[AxisGroup, ...] | None:
        """`long`, and a group for each label; None where no length is left for a label."""
        groups = list(long)
        for label in dict.fromkeys(labels):
            if label == FIXED:
                continue
            parts = [unit for unit, key in zip(units, labels, strict=True) if key == label]
            axes = tuple(axis for unit in parts for axis in unit.axes)
            longer = self._longer(replace(parts[0], axes=axes), groups, short)
            if longer is None:
                return None
            groups.append(longer)
        return tuple(groups)

    def _longer(
        self, group: AxisGroup, others: Sequence[AxisGroup], short: bool
    ) -> AxisGroup | None:
        used = {other.length for other in others}
        lengths = longer_than_one(group, short)
        allowed = [n for n in lengths if n not in used and group.allows(n)]
        length = min(allowed, key=self.common.__contains__, default=None)
        return None if length is None else replace(group, length=length)

    def _with_lone(
        self, groups: tuple[AxisGroup, ...], units: Sequence[AxisGroup]
    ) -> tuple[AxisGroup, ...]:
        """The groups, and each unit that runs at a length of its own."""
        for unit in units:
            longer = self._longer(unit, groups, short=True)
            if longer is None or self._refuted(longer):
                continue
            if self.runs(*groups, longer):
                groups = (*groups, longer)
        return groups

    def _split(self, groups: Sequence[AxisGroup]) -> tuple[AxisGroup, ...]:
        """The groups, each divided into parts as long as the parts may differ in length."""
        done: list[AxisGroup] = []
        waiting = list(groups)
        while waiting:
            group = waiting.pop(0)
            parts = self._parts(group, [*done, *waiting])
            if parts:
                waiting = [*parts, *waiting]
            else:
                done.append(group)
        return tuple(done)

    def _parts(self, group: AxisGroup, others: Sequence[AxisGroup]) -> tuple[AxisGroup, ...]:
        if len(group.axes) < 2 or group.name or not group.length:
            return ()
        used = {other.length for other in others}
        lengths = [n for n in other_lengths(group.length) if n not in used and group.allows(n)]
        other = next((n for n in lengths if self.runs(*others, replace(group, length=n))), None)
        if other is None:
            return self._changeable(group, others, lengths)
        for axes in _subsets(group.axes):
            part, rest = _parted(group, axes)
            moved, still = replace(part, length=other), replace(rest, length=other)
            if self.refuted and any(self.joining.issuperset(p.axes) for p in (part, rest)):
                continue  # a mask that one text alone does not need still has its length
            if self.runs(*others, moved, rest) and self.runs(*others, part, still):
                return rest, moved
        return ()

    def _changeable(
        self, group: AxisGroup, others: Sequence[AxisGroup], lengths: Sequence[int]
    ) -> tuple[AxisGroup, ...]:
        """Divides a group whose axes cannot all change at once: into the largest part that can
        change and the rest, which has the same length by coincidence; or else into single axes."""
        for axes in reversed(list(_subsets(group.axes))):
            for part, rest in (_parted(group, axes)[::-1], _parted(group, axes)):
                for length in lengths:
                    moved = replace(part, length=length)
                    if self.runs(*others, moved, rest):
                        return moved, rest
        return tuple(replace(group, axes=(axis,)) for axis in group.axes)

    def _joined(self, groups: Sequence[AxisGroup]) -> tuple[AxisGroup, ...]:
        """The groups without each axis in `joining` that shares no group with another tensor."""
        joined = []
        for group in groups:
            anchors = {axis.tensor for axis in group.axes if axis not in self.joining}
            axes = tuple(
                axis for axis in group.axes if axis not in self.joining or anchors - {axis.tensor}
            )
            if axes:
                joined.append(replace(group, axes=axes))
        return tuple(joined)

    def _distinct(self, groups: Sequence[AxisGroup]) -> tuple[AxisGroup, ...]:
        """The groups at lengths that no other axis has, as far as the call runs at them."""
        done: list[AxisGroup] = []
        for index, group in enumerate(groups):
            rest = groups[index + 1 :]
            used = {*self.common, *(other.length for other in (*done, *rest))}
            if self._refuted(group):
                group = replace(group, length=self._length(group))
            elif group.length and group.length in {*self.common, *(g.length for g in done)}:
                lengths = [n for n in other_lengths(group.length) if n not in used]
                moves = [replace(group, length=n) for n in lengths if group.allows(n)]
                running = (moved for moved in moves if self.runs(*done, moved, *rest))
                group = next(running, group)
            done.append(group)
        return tuple(done)


def _parted(group: AxisGroup, axes: tuple[Axis, ...]) -> tuple[AxisGroup, AxisGroup]:
    rest = tuple(axis for axis in group.axes if axis not in axes)
    return replace(group, axes=axes), replace(group, axes=rest)


def _assignments(units: Sequence[AxisGroup], joining: frozenset[Axis]) -> Iterator[tuple[str, ...]]:
    """Labels for the units, most plausible first: its name or kind, the other kind, FIXED.

    A unit in `joining` gets the label of another unit if possible, and FIXED otherwise.
    """
    labels = sorted({_label(u) for u in units if not u.name and not joining.intersection(u.axes)})
    options: list[list[str]] = []
    for unit in units:
        if joining.intersection(unit.axes):
            options.append([*reversed(labels), FIXED])
        else:
            others = [] if unit.name else [other for other in labels if other != _label(unit)]
            options.append([_label(unit), *others, FIXED])
    for count in range(len(units) + 1):
        for changed in combinations(range(len(units)), count):
            choices = (o[1:] if i in changed else o[:1] for i, o in enumerate(options))
            yield from product(*choices)


def _label(unit: AxisGroup) -> str:
    """The name of a unit, else "batch" for a first axis and "sequence" for any other."""
    return unit.name or ("batch" if unit.axes[0].axis == 0 else "sequence")


def _subsets(axes: tuple[Axis, ...]) -> Iterator[tuple[Axis, ...]]:
    """Proper subsets of the axes, one of each complementary pair; single axes and prefixes alone
    where there are many axes."""
    count = len(axes)
    if count <= MOST_IN_ALL_SUBSETS:
        for size in range(1, count // 2 + 1):
            for part in combinations(axes, size):
                if 2 * size < count or axes[0] in part:
                    yield part
        return
    yield from ((axis,) for axis in axes)
    yield from (axes[:end] for end in range(2, count - 1))


@dataclass(frozen=True)
class Widened:
    """The tensors to export, the axes that may vary in them, and which of these share a size.

    `moved` are the groups whose length differs from the example's. `first` has other lengths, which
    the program of these excludes.
    """

    tensors: tuple[torch.Tensor, ...]
    wishes: tuple[Axes, ...]
    groups: tuple[AxisGroup, ...]
    moved: tuple[AxisGroup, ...]
    first: Widened | None = None


def widen(
    call: ModuleCall,
    wishes: Sequence[Axes],
    joining: Collection[Axis] = (),
    refuted: Collection[Collection[Axis]] = (),
    avoided: Collection[int] = (),
) -> Widened:
    """`call`'s example resized so that no axis has a special length.

    Axes of length 1 are lengthened, one group at a time; where the module then fails, they keep
    length 1 and may not vary. Axes of equal length become one group, unless the module runs when
    only one of them is longer. Axes in `joining` vary only in a group with axes of other tensors.
    Groups with the axes in `refuted` keep their length. Lengths in `avoided` are special, because
    the module compares sizes with them. Raises CaptureError where a size that the user named can
    only be 1.
    """
    example = call.tensors
    groups, units = groups_and_units(example, wishes, joining)
    free = {axis for part in (*groups, *units) for axis in part.axes}
    search = Search(
        Trials(call),
        example,
        _fixed_sizes(call, free).union(avoided),
        frozenset(joining),
        frozenset(map(frozenset, refuted)),
    )
    groups = search.groups(groups, units)
    varying = {axis for group in groups for axis in group.axes}
    joined = (free | set(joining)) - varying
    for unit in units:
        if unit.name and joined.intersection(unit.axes):
            raise CaptureError(
                f"{unit.name} is to vary, and the module runs only where it is 1, as in the "
                "example: leave it out of dynamic_shapes, or see why the module fails at other "
                "lengths"
            )
    return Widened(
        resized(example, groups),
        tuple(
            {axis: dim for axis, dim in wish.items() if (index, axis) not in joined}
            for index, wish in enumerate(wishes)
        ),
        groups,
        tuple(g for g in groups if g.length != example[g.axes[0].tensor].shape[g.axes[0].axis]),
    )


def at_lengths(widened: Widened, inputs: Sequence[Value], sizes: Mapping[str, int]) -> Widened:
    """`widened` with each group of axes at the length that its name in `inputs` has in `sizes`."""
    groups = []
    for group in widened.groups:
        first = group.axes[0]
        name = str(inputs[first.tensor].shape[first.axis])
        groups.append(replace(group, length=sizes.get(name, group.length)))
    return replace(widened, tensors=resized(widened.tensors, groups), groups=tuple(groups))


def fixed_at_one(widened: Widened) -> Widened:
    """`widened` with the groups of length 1 as axes that do not vary."""
    groups = tuple(group for group in widened.groups if group.length != 1)
    varying = {axis for group in groups for axis in group.axes}
    ones = {axis for group in widened.groups for axis in group.axes} - varying
    wishes = tuple(
        {axis: dim for axis, dim in wish.items() if Axis(index, axis) not in ones}
        for index, wish in enumerate(widened.wishes)
    )
    return replace(widened, groups=groups, wishes=wishes)


def _fixed_sizes(call: ModuleCall, free: Collection[Axis]) -> frozenset[int]:
    weights = chain(call.parameters(), call.buffers())
    fixed = {
        size
        for index, tensor in enumerate(call.tensors)
        for number, size in enumerate(tensor.shape)
        if Axis(index, number) not in free
    }
    return frozenset(fixed.union(*(weight.shape for weight in weights)))


def refuted(
    program: Program, eager: Eager, example: Sequence[torch.Tensor], widened: Widened
) -> tuple[AxisGroup, ...]:
    """The groups of axes whose exported length makes the graph wrong at the example's length.

    Empty where graph and module agree on the example. Otherwise the groups that disagree when they
    alone have the example's length, or all moved groups if none does.
    """
    if not widened.moved or agree(program, eager, example):
        return ()
    wrong = []
    for group in widened.moved:
        first = group.axes[0]
        back = replace(group, length=example[first.tensor].shape[first.axis])
        if agree(program, eager, resized(widened.tensors, [back])) is False:
            wrong.append(group)
    return tuple(wrong) or widened.moved


def excluded(
    program: Program, example: Sequence[torch.Tensor], widened: Widened, fixed: Collection[str]
) -> tuple[AxisGroup, ...]:
    """The groups of another length than the example's whose length there is outside of the
    program's bounds, of one size or of a product; not those in `fixed`, which the user set."""
    sizes, names = sizes_of(program, example), set[str]()
    for size, limits in program.graph.bounds.items():
        if violated({size: limits}, sizes) is not None:
            names |= symbols(parse_dim(size))
    inputs = program.graph.inputs
    moved = ((group, group.axes[0]) for group in widened.moved)
    named = ((group, str(inputs[tensor].shape[axis])) for group, (tensor, axis) in moved)
    return tuple(group for group, name in named if name in names and name not in fixed)
