"""A compiled model against the module it came from, on random inputs of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.capture import Captured
from moec.closeness import FAR, STRAYS, default_tolerance, distance, strays
from moec.errors import IRError, VerificationError
from moec.evaluate import evaluate
from moec.passes.runner import Step
from moec.random_inputs import random_like
from moec.sizes import Bounds

Run = Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Checked:
    """The greatest error of each output over all cases, what was allowed, and how many of the
    rows were farther off (allowed in 16 bits alone, see `moec.closeness.STRAYS`)."""

    errors: Mapping[str, float]
    tolerance: float
    strays: int = 0
    rows: int = 0


def cases(captured: Captured) -> list[tuple[torch.Tensor, ...]]:
    """The example, random inputs of its sizes, and of the least and of odd sizes."""
    program, generator = captured.program, torch.Generator().manual_seed(0)
    own = len(captured.example)
    made = [captured.example]
    for size in ({}, _sizes(captured, lambda b: max(b.low, 1)), _sizes(captured, _odd)):
        example = [
            _resize(t, v.shape, size)
            for t, v in zip(captured.example, program.graph.inputs, strict=False)
        ]
        made.append(tuple(random_like(program, example, generator)[:own]))
    return made


def _odd(bounds: Bounds) -> int:
    """Neither the example's size nor a multiple of any tile, within the bounds."""
    high = bounds.high if bounds.high is not None else 19
    return max(bounds.low, min(high, 19 if bounds.low <= 19 else bounds.low))


def _sizes(captured: Captured, choose: Callable[[Bounds], int]) -> dict[str, int]:
    """A size for each name; only the last name of an input is odd, so that cases stay small."""
    graph = captured.program.graph
    return {
        name: choose(bounds) if name != "B" else min(choose(bounds), 3)
        for name, bounds in graph.bounds.items()
    }


def _resize(tensor: torch.Tensor, shape: Sequence[Any], sizes: Mapping[str, int]) -> torch.Tensor:
    """`tensor` repeated and cut so that its named axes have the given sizes."""
    for axis, dim in enumerate(shape):
        wanted = sizes.get(str(dim))
        if wanted is not None and tensor.shape[axis]:
            index = torch.arange(wanted) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor


def check(
    captured: Captured, run: Run, steps: Sequence[Step], tolerance: float | None = None
) -> Checked:
    """Compare `run` with eager on every case.

    Raises VerificationError, naming the first pass that changed the numbers, where an output
    is farther off than `tolerance`.
    """
    graph = captured.program.graph
    limit = default_tolerance(graph) if tolerance is None else tolerance
    used = {value.dtype for value in graph.values()}
    share = max((STRAYS.get(dtype, 0.0) for dtype in used), default=0.0)
    names = [value.name for value in graph.outputs]
    inputs = [value.name for value in graph.inputs]
    worst = dict.fromkeys(names, 0.0)
    found, rows = 0, 0
    farthest: tuple[float, str, tuple[torch.Tensor, ...]] = (0.0, "", ())
    for case in cases(captured):
        expected = captured.eager(*case)
        got = run(dict(zip(inputs, case, strict=False)))
        for name, value in zip(names, expected, strict=False):
            error = distance(got[name], value)
            worst[name] = max(worst[name], error)
            farthest = max(farthest, (error, name, case), key=lambda found: found[0])
            if not error <= (FAR if share and limit < FAR else limit):
                raise _differs(name, error, limit, captured, case, steps)
            few, many = strays(got[name], value, limit)
            found, rows = found + few, rows + many
    if found > share * rows:
        error, name, case = farthest
        raise _differs(name, error, limit, captured, case, steps)
    return Checked(worst, limit, found, rows)


def _differs(
    name: str,
    error: float,
    limit: float,
    captured: Captured,
    case: Sequence[torch.Tensor],
    steps: Sequence[Step],
) -> VerificationError:
    sizes = ", ".join(str(tuple(t.shape)) for t in case)
    return VerificationError(
        f"{name} differs from eager by {error:.1e} of its greatest value, allowed are "
        f"{limit:.0e} (inputs {sizes}); {_blame(captured, case, steps, limit)}"
    )


def _blame(
    captured: Captured, case: Sequence[torch.Tensor], steps: Sequence[Step], limit: float
) -> str:
    """Which pass first made a graph that differs, or that it was none of them."""
    expected = captured.eager(*case)
    states = [captured.program.weights[s.before.name] for s in captured.program.graph.states]
    for step in steps:
        try:
            got = evaluate(step.program.graph, [*case, *states], step.program.weights)
        except (IRError, RuntimeError) as error:
            return f"the graph after {step.name} does not run: {error}"
        if any(not distance(a, b) <= limit for a, b in zip(got, expected, strict=False)):
            return f"the first pass after which the graph differs is {step.name}"
    return "the graph is right after every pass: the generated code is wrong"
