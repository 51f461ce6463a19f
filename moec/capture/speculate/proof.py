"""A capture beside eager, on draws in which every branch that was answered comes out both ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moec.capture.speculate.draws import MOST_ROWS, draws
from moec.capture.speculate.sites import Site
from moec.capture.speculate.trace import Assumed
from moec.capture.speculate.watching import Ways, watched
from moec.errors import CaptureError, IRError
from moec.interpret.evaluate import evaluate
from moec.interpret.outputs import VaryingOutput
from moec.interpret.tolerance import default_tolerance, distance
from moec.ir.graph import Program

Eager = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Verdict:
    """error: the greatest difference from eager, inputs: the sizes at which they are too far
    apart. unproved: the branches that did not come out both ways. compared: how often eager ran."""

    error: float
    inputs: str
    unproved: tuple[Site, ...]
    compared: int

    @property
    def agrees(self) -> bool:
        return not self.inputs


def examine(
    program: Program,
    eager: Eager,
    examples: Sequence[Sequence[torch.Tensor]],
    assumed: Assumed,
    outputs: int,
) -> Verdict:
    """Run both on draws until they differ. Where eager itself fails, as at a size that it does
    not take, a draw says nothing. Raises VaryingOutput where eager returns other constants.

    The program has `outputs` outputs, and behind them the readouts of what was assumed. A branch
    is proved where eager went both ways, or where all that was asked there came out both ways in
    the program, which goes one way, while both agreed.
    """
    limit = default_tolerance(program.graph)
    conditions = [q.condition for q in assumed.questions if q.condition is not None]
    ways: Ways = {}
    outcomes: dict[int, set[bool]] = {number: set() for number in range(len(assumed.questions))}
    worst, compared = 0.0, 0
    for case in _sized(draws(program.graph, examples, conditions)):
        try:
            with watched(assumed.branches) as went:
                expected = eager(*(tensor.clone() for tensor in case))
        except VaryingOutput:
            raise
        except Exception as failure:
            if not compared:
                raise CaptureError(f"the model fails on its example inputs: {failure}") from failure
            continue
        compared += 1
        results = _run(program, case)
        pairs = zip(results[:outputs], expected, strict=True) if results else ()
        error = max((distance(a, b) for a, b in pairs), default=0.0 if results else math.inf)
        if not error <= limit:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in case)
            return Verdict(error, shapes, tuple(assumed.branches), compared)
        worst = max(worst, error)
        for site, offsets in went.items():
            ways.setdefault(site, set()).update(offsets)
        for number, outcome in _outcomes(assumed, case, results[outputs:]):
            outcomes[number].add(outcome)
    answered = {q.site for number, q in enumerate(assumed.questions) if len(outcomes[number]) < 2}
    unproved = (s for s in assumed.branches if len(ways.get(s, ())) < 2 and s in answered)
    return Verdict(worst, "", tuple(unproved), compared)


def _outcomes(
    assumed: Assumed, case: Sequence[torch.Tensor], readouts: Sequence[torch.Tensor]
) -> Iterator[tuple[int, bool]]:
    """How each question came out in the program, by its number, where the readouts tell."""
    values = dict(zip(assumed.readouts, (int(tensor) for tensor in readouts), strict=True))
    sizes = {s: case[number].shape[axis] for s, (number, axis) in assumed.sizes.items()}
    for number, question in enumerate(assumed.questions):
        if question.condition is None:
            yield number, bool(values[number])
            continue
        outcome = question.condition.subs({**sizes, **values})
        if outcome in (True, False):
            yield number, bool(outcome)


def _sized(cases: Iterable[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    for case in cases:
        if all(math.prod(tensor.shape[:-1]) <= 2 * MOST_ROWS for tensor in case):
            yield case


def _run(program: Program, case: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The program's results; none where it fails though eager does not."""
    states = [program.weights[state.before.name] for state in program.graph.states]
    try:
        with torch.no_grad():
            return evaluate(program.graph, [*case, *states], program.weights)
    except (RuntimeError, IRError, IndexError, ValueError):
        return ()
