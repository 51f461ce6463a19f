"""Chooses the lengths at which a module is exported, so that the export holds for all lengths.

torch.export evaluates conditions on sizes (is it 1? does it equal that size?) with the example, and
the outcome then applies to every size. So the example is resized, by repeating its elements, until
no length is 1 and no two lengths are equal by coincidence. Axes share a size where the module runs
only if they change together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from moec.capture.calls.call import ModuleCall
from moec.capture.calls.trials import Trials
from moec.capture.sizes.axis_groups import Axis, AxisGroup, groups_and_units, resized
from moec.capture.sizes.axis_search import Search
from moec.capture.sizes.wishes import Axes
from moec.errors import CaptureError
from moec.ir.graph import Program, Value
from moec.ir.sizes.dims import Bounds
from moec.oracle.agree import agree
from moec.oracle.cases import Eager


@dataclass(frozen=True)
class Widened:
    """The tensors to export, the axes that may vary in them, and which of these share a size.

    `moved` are the groups whose length differs from the example's.
    """

    tensors: tuple[torch.Tensor, ...]
    wishes: tuple[Axes, ...]
    groups: tuple[AxisGroup, ...]
    moved: tuple[AxisGroup, ...]


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
    """The groups whose length in the example is outside of the program's bounds, other than those
    in `fixed`, which the user set."""
    groups = []
    for group in widened.moved:
        tensor, axis = group.axes[0]
        name = str(program.graph.inputs[tensor].shape[axis])
        limits = program.graph.bounds.get(name, Bounds())
        if name not in fixed and not limits.contains(example[tensor].shape[axis]):
            groups.append(group)
    return tuple(groups)
