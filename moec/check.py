"""A compiled model against the module it came from, on random inputs of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.capture import Captured
from moec.closeness import FAR, STRAYS, default_tolerance, distance, strays
from moec.errors import CaptureError, IRError, VerificationError
from moec.evaluate import evaluate
from moec.ir import Graph
from moec.passes.runner import Step
from moec.random_inputs import random_like
from moec.sizes import Bounds, evaluate_dim, symbols

Case = tuple[torch.Tensor, ...]
Answer = tuple[Case, tuple[torch.Tensor, ...]]
Run = Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Checked:
    """The greatest error of each output over all cases, what was allowed, and how many of the
    rows were farther off (allowed in 16 bits alone, see `moec.closeness.STRAYS`). `skipped` says
    which sizes the module itself does not run at."""

    errors: Mapping[str, float]
    tolerance: float
    strays: int = 0
    rows: int = 0
    skipped: tuple[str, ...] = ()


def cases(captured: Captured) -> list[Case]:
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
        wanted = evaluate_dim(dim, sizes) if symbols(dim) <= set(sizes) else tensor.shape[axis]
        if wanted != tensor.shape[axis] and tensor.shape[axis]:
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
    rule = _Rule.of(graph, tolerance)
    names = [value.name for value in graph.outputs]
    inputs = [value.name for value in graph.inputs][: len(captured.example)]
    worst = dict.fromkeys(names, 0.0)
    found, rows = 0, 0
    farthest: tuple[float, str, Case] = (0.0, "", ())
    known, skipped = _answers(captured)
    for case, expected in known:
        got = run(dict(zip(inputs, case, strict=True)))
        for name, value in zip(names, expected, strict=True):
            error = distance(got[name], value)
            worst[name] = max(worst[name], error)
            farthest = max(farthest, (error, name, case), key=lambda found: found[0])
            if not error <= rule.greatest:
                raise _differs(name, error, case, rule, captured, known, steps)
            few, many = strays(got[name], value, rule.limit)
            found, rows = found + few, rows + many
    if found > rule.share * rows:
        error, name, case = farthest
        raise _differs(name, error, case, rule, captured, known, steps)
    return Checked(worst, rule.limit, found, rows, skipped)


def _answers(captured: Captured) -> tuple[list[Answer], tuple[str, ...]]:
    """What eager gives in each case, and in words the cases in which it fails."""
    known: list[Answer] = []
    skipped: list[str] = []
    for case in cases(captured):
        try:
            known.append((case, captured.eager(*case)))
        except Exception as error:
            if case is captured.example:
                raise CaptureError(f"the model fails on its example inputs: {error}") from error
            skipped.append(f"inputs {_shapes(case)} were not compared: the model fails: {error}")
    return known, tuple(dict.fromkeys(skipped))


@dataclass(frozen=True)
class _Rule:
    """No error above `greatest`, and above `limit` no more than a `share` of the rows."""

    limit: float
    greatest: float
    share: float

    @staticmethod
    def of(graph: Graph, tolerance: float | None) -> _Rule:
        limit = default_tolerance(graph) if tolerance is None else tolerance
        share = max((STRAYS.get(value.dtype, 0.0) for value in graph.values()), default=0.0)
        return _Rule(limit, max(limit, FAR) if share else limit, share)

    def allows(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        found, rows = 0, 0
        for got, expected in pairs:
            if not distance(got, expected) <= self.greatest:
                return False
            few, many = strays(got, expected, self.limit)
            found, rows = found + few, rows + many
        return found <= self.share * rows


def _differs(
    name: str,
    error: float,
    case: Case,
    rule: _Rule,
    captured: Captured,
    known: Sequence[Answer],
    steps: Sequence[Step],
) -> VerificationError:
    return VerificationError(
        f"{name} differs from eager by {error:.1e} of its greatest value, allowed are "
        f"{rule.limit:.0e} (inputs {_shapes(case)}); {_blame(rule, captured, known, steps)}"
    )


def _shapes(case: Case) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in case)


def _blame(rule: _Rule, captured: Captured, known: Sequence[Answer], steps: Sequence[Step]) -> str:
    """Which pass first made a graph that differs, or that it was none of them."""
    states = [captured.program.weights[s.before.name] for s in captured.program.graph.states]

    def pairs(step: Step) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for case, expected in known:
            got = evaluate(step.program.graph, [*case, *states], step.program.weights)
            yield from zip(got, expected, strict=False)  # the states that follow are not compared

    for step in steps:
        try:
            if not rule.allows(pairs(step)):
                return f"the first pass after which the graph differs is {step.name}"
        except (IRError, RuntimeError) as error:
            return f"the graph after {step.name} does not run: {error}"
    return "the graph is right after every pass: the generated code is wrong"
