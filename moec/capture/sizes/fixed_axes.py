"""Finds axes that an export fixed at the example's size although they were to vary.

An export fixes an axis where the module needs its size as a Python number (a loop over range(n)),
or where the axis must match a weight. In the second case the module runs at no other size, and the
axis is only noted. In the first it does run at other sizes, so the capture is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from moec.capture.sizes.guards import Guard, guard_at, shape_env
from moec.capture.sizes.wishes import Axes
from moec.errors import CaptureError, IRError, UsageError
from moec.ir.graph import Program
from moec.ir.interpret.resized import resized_axes
from moec.ir.replace_sizes import replace_sizes
from moec.ir.sizes.dims import Dim, canonical
from moec.ir.sizes.thresholds import truth_of
from moec.oracle.cases import Eager

Axis = tuple[int, int]
"""An axis of an input: (number of the input, number of its axis)."""

_INDEX = re.compile(r"\bidx=(\d+)")
_TENSOR = re.compile(r"\bindex=(\d+)")


def causes(exported: ExportedProgram) -> dict[Axis, Guard]:
    """For each axis of an input that the export fixed, the guard that fixed it."""
    env = shape_env(exported)
    guards: dict[Axis, Guard] = {}
    for guard in () if env is None else env.guards:
        if isinstance(guard.expr, sympy.Eq) and guard.expr.args[1].is_number:
            for symbol in guard.expr.free_symbols:
                for source in env.var_to_sources.get(symbol, ()):
                    text = repr(source)
                    tensor, axis = _TENSOR.search(text), _INDEX.search(text)
                    if tensor and axis:
                        input_axis = int(tensor[1]), int(axis[1])
                        guards.setdefault(input_axis, guard_at(guard))
    return guards


def fixed(
    name: str,
    program: Program,
    eager: Eager,
    example: Sequence[torch.Tensor],
    wishes: Sequence[Axes],
    allowed: bool | str | Collection[str],
    guards: Mapping[Axis, Guard],
) -> tuple[str, ...]:
    """Notes for the report about axes that have a fixed size.

    Raises CaptureError for an axis that should vary according to `wishes`, is fixed in the program,
    and at which the module itself runs with another size; not for the inputs in `allowed` (True:
    every input). Raises UsageError where `allowed` names an input that does not exist.
    """
    inputs = program.graph.inputs[: len(example)]
    inputs_allowed = _allowed(allowed, [value.name for value in inputs])
    lost = [
        axis for axis in lost_axes(program, wishes) if inputs[axis[0]].name not in inputs_allowed
    ]
    for index, axis in lost:
        size = example[index].shape[axis]
        together = [(p, a) for p, a in lost if example[p].shape[a] == size]
        other = _runs_at(eager, example, [[(index, axis)], together], size)
        if other is not None:
            raise CaptureError(
                _refusal(name, inputs[index].name, axis, size, other, guards.get((index, axis)))
            )
    return notes(program, len(example))


def lost_axes(program: Program, wishes: Sequence[Axes]) -> list[Axis]:
    """The axes that were to vary, but have one fixed size in the program."""
    return [
        (index, axis)
        for index, (value, wish) in enumerate(zip(program.graph.inputs, wishes, strict=False))
        for axis, size in enumerate(value.shape)
        if isinstance(size, int) and _varies(wish.get(axis))
    ]


def _varies(wish: Any) -> bool:
    """Whether an axis was meant to vary: its wish is a Dim, or a hint other than Dim.STATIC."""
    return wish is not None and not isinstance(wish, int) and "STATIC" not in str(wish)


def _allowed(allowed: bool | str | Collection[str], names: Sequence[str]) -> set[str]:
    if isinstance(allowed, bool):
        return set(names) if allowed else set()
    input_names = {allowed} if isinstance(allowed, str) else set(allowed)
    unknown = input_names - set(names)
    if unknown:
        raise UsageError(
            f"allow_fixed names {', '.join(sorted(unknown))}, but the inputs are {', '.join(names)}"
        )
    return input_names


def _runs_at(
    eager: Eager, example: Sequence[torch.Tensor], groups: Sequence[Sequence[Axis]], size: int
) -> int | None:
    """Another size of these axes at which the module runs, or None. Sizes 0 and 1 are not tried: an
    axis of size 1 broadcasts."""
    for other in _other_sizes(size):
        for group in groups:
            try:
                eager(*resized_axes(example, group, other))
            except Exception:  # whatever the user's code raises: it does not run
                continue
            return other
    return None


def _other_sizes(size: int) -> Iterator[int]:
    for other in (size + 1, size - 1, 2 * size, size + 8, size + 2):
        if other > 1 and other != size:
            yield other


def notes(program: Program, inputs: int) -> tuple[str, ...]:
    """A note for each fixed axis, except the last axis (features) of a float input."""
    return tuple(
        f"{value.name} axis {axis} is always {size}"
        for value in program.graph.inputs[:inputs]
        for axis, size in enumerate(value.shape)
        if isinstance(size, int) and (axis < len(value.shape) - 1 or value.dtype.startswith("i"))
    )


def _refusal(name: str, value: str, axis: int, size: int, other: int, guard: Guard | None) -> str:
    where = f"\n  {guard}" if guard is not None and guard.file else ""
    return (
        f"{name}: axis {axis} of {value} would always be {size}, as in the example, and the module "
        f"runs at {other} too{where}\n"
        f"  keep the size symbolic (no loop over range of it, no list of that length, no "
        f"text of it), or say that it stays {size}:\n"
        f'  allow_fixed="{value}" (--allow-fixed {value}), or dynamic_shapes (--shapes)'
    )


_FEW = 64
"""A size with more values than that is not tried at each of them."""
_STEPS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.Max, sympy.Min)


def fold_constant_sizes(program: Program) -> Program:
    """The program with numbers for roundings, remainders, maxima and minima of one size that have
    one value within its bounds."""
    values = {
        name: range(bounds.low, bounds.high + 1)
        for name, bounds in program.graph.bounds.items()
        if bounds.high is not None and bounds.high - bounds.low < _FEW
    }
    if not values:
        return program
    numbers: dict[sympy.Expr, int | None] = {}

    def fold(size: sympy.Expr) -> Dim:
        for part in size.atoms(*_STEPS) - numbers.keys():
            numbers[part] = _number(part, values)
        rule = {part: n for part in size.atoms(*_STEPS) if (n := numbers[part]) is not None}
        return canonical(sympy.expand(size.xreplace(rule))) if rule else size

    return Program(replace_sizes(program.graph, fold), program.weights)


def _number(part: sympy.Expr, values: dict[str, range]) -> int | None:
    """The value of an expression of one size, if it is the same number at all `values`."""
    truth = truth_of(part)
    if len(truth.names) != 1 or not truth.names <= values.keys():
        return None
    (name,) = truth.names
    try:
        results = {truth.value({name: size}) for size in values[name]}
    except (ZeroDivisionError, IRError):  # a division by this size, or a function of torch's
        return None
    (first, *others) = results
    return int(first) if not others and first == int(first) else None
