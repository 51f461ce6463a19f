"""Sizes of 1 and 0, and lengths of the export, at which a captured graph and its module agree."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import replace

import torch

from moec.capture.sizes.axis_groups import AxisGroup, resized
from moec.capture.sizes.widen import Widened
from moec.interpret.outputs import VaryingOutput
from moec.ir.graph import Program
from moec.ir.sizes.dims import Bounds
from moec.oracle.agree import agree, at_sizes
from moec.oracle.cases import Eager


def cut(tensor: torch.Tensor, axes: Sequence[int], index: int = 0, length: int = 1) -> torch.Tensor:
    """`tensor` with each of `axes` narrowed to the one element at `index`, or to none."""
    for axis in axes:
        if tensor.shape[axis]:
            tensor = tensor.narrow(axis, index % tensor.shape[axis], length)
    return tensor


def allow_one(
    program: Program,
    fixed_bounds: Collection[str],
    eager: Eager,
    examples: Sequence[Sequence[torch.Tensor]],
    conditional: Set[str] = frozenset(),
) -> Program:
    """The program with a lower bound of 1 for each size at which graph and module agree at 1, else
    2.

    A bound of 2 comes from torch.export, which treats 1 specially, or from a branch of the module
    (`if length > 1`); a branch may also leave no bound. Sizes in `fixed_bounds` keep their bounds,
    and so does a size at which the module does not run with 1. Each size is tried at 1 alone and
    together with the sizes lowered before it, in the first of `examples` that the module runs. A
    size in `conditional`, those of which a condition changes at 1, is tried beside small and large
    other sizes too: `if n > 1 or length > 4` shows nothing of the length where n is above 1.
    """
    graph = program.graph
    bounds = dict(graph.bounds)
    lowered: set[str] = set()

    def agrees(names: Collection[str]) -> bool | None:
        cuts = (_cut_to(1, program, tensors, names) for tensors in examples)
        answers = ((agree(program, eager, tensors), tensors) for tensors in cuts)
        answer, at_one = next((a for a in answers if a[0] is not None), (None, ()))
        if not answer or not conditional & set(names):
            return answer
        return all(
            agree(program, eager, t) is not False for t in _other_sizes_of(program, at_one, names)
        )

    for name, limits in graph.bounds.items():
        if limits.low > 2 or name in fixed_bounds or not name.isidentifier():
            continue
        answers = [agrees(names) for names in ({name}, lowered | {name})[: 1 + bool(lowered)]]
        if all(answers):
            bounds[name] = replace(limits, low=min(limits.low, 1))
            lowered.add(name)
        elif False in answers:
            bounds[name] = Bounds(2, limits.high)
    return Program(replace(graph, bounds=bounds), program.weights)


_OTHERS = (2, 3, 5, 37, 257)


def _other_sizes_of(
    program: Program, tensors: Sequence[torch.Tensor], names: Collection[str]
) -> Iterator[list[torch.Tensor]]:
    """The tensors with each size that is none of `names` small and large."""
    for name in program.graph.bounds:
        if name.isidentifier() and name not in names:
            yield from (at_sizes(program, tensors, {name: size}) for size in _OTHERS)


def refuse_zero(
    program: Program, eager: Eager, examples: Sequence[Sequence[torch.Tensor]]
) -> Program:
    """The program with a lower bound of 1 for each size at which graph and module differ at 0, or
    Python's arithmetic fails in the module.

    torch takes it that no size is 0: it is silent about a branch on it (`if tokens:`), and in
    `max(tokens, 1)` it sees the tokens alone. Each size is 0 alone, in the first of `examples` that
    the module runs.
    """
    bounds = dict(program.graph.bounds)
    for name, limits in program.graph.bounds.items():
        if limits.low or not name.isidentifier():
            continue
        tried = (_cut_to(0, program, tensors, {name}) for tensors in examples)
        answers = (_agree_at_zero(program, eager, tensors) for tensors in tried)
        if next((answer for answer in answers if answer is not None), None) is False:
            bounds[name] = replace(limits, low=1)
    return replace(program, graph=replace(program.graph, bounds=bounds))


def _agree_at_zero(program: Program, eager: Eager, tensors: Sequence[torch.Tensor]) -> bool | None:
    """Whether graph and module agree where a size is 0. An operator of torch that fails there
    (None) has no other result."""
    try:
        eager(*tensors)
    except (VaryingOutput, ArithmeticError, ValueError):
        return False
    except Exception:  # whatever the module raises
        return None
    return agree(program, eager, tensors)


def _cut_to(
    length: int, program: Program, tensors: Sequence[torch.Tensor], names: Collection[str]
) -> list[torch.Tensor]:
    """The tensors with the first elements alone, 0 or 1, of each axis whose size has a name in
    `names`."""
    axes = [
        [axis for axis, dim in enumerate(value.shape) if str(dim) in names]
        for value in program.graph.inputs
    ]
    return [cut(t, a, length=length) for t, a in zip(tensors, axes, strict=False)]


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
