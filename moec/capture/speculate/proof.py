"""Proves a capture against eager, on inputs for which every answered branch goes both ways."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from moec.capture.sizes.guards import Guard
from moec.capture.speculate.branches import Question
from moec.capture.speculate.trace import Assumed
from moec.capture.speculate.watching import Ways, watched
from moec.capture.user_code.sites import Site
from moec.errors import CaptureError, IRError
from moec.ir.graph import Graph, Program
from moec.ir.interpret.evaluate import evaluate_anywhere
from moec.ir.interpret.outputs import VaryingOutput
from moec.ir.sizes.dims import Bounds
from moec.ir.sizes.thresholds import nearest_allowed, truth_of
from moec.oracle.agree import at_sizes, error_of, same_results, sizes_of
from moec.oracle.cases import Case, Eager, Result, Run, cases, drawn_and_run, shapes
from moec.oracle.draws import DRAWS
from moec.oracle.tolerance import default_tolerance

# Inputs on which a capture is proved: sizes on both sides of each number that a condition compares
# with, and routings in which an expert gets all rows, none, or some.

MOST_ROWS = 4096
"""The most rows that a proof draws. A branch that needs more rows to go both ways is refused."""

_SHAPES: tuple[tuple[int, ...], ...] = ((1, 1), (3, 29), (1, 7), (5, 1), (4, 40), (2, 2))


def draws(
    program: Program, example: Sequence[torch.Tensor], conditions: Iterable[Any], run: Run[Result]
) -> Iterator[tuple[Case, Result]]:
    """Draws of every kind at several sizes, and the results of `run` for them."""
    for sizes in _assignments(program.graph, example, conditions):
        resized = at_sizes(program, example, sizes)
        if any(math.prod(tensor.shape[:-1]) > 2 * MOST_ROWS for tensor in resized):
            continue
        for draw in DRAWS:
            accepted = drawn_and_run(program, resized, run, draw)
            if accepted is not None:
                yield accepted


def not_finite(example: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The example with a row of NaN and with an infinite row, for branches on `isfinite`."""
    for number in (float("nan"), float("inf")):
        case = [tensor.clone() for tensor in example]
        for tensor in case:
            if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel():
                tensor.view(-1, tensor.shape[-1])[-1] = number
        yield case


def other_integers(case: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The case with negative and large numbers added to the integers of an input, to one of them
    or to all: where all are one number, a side of a branch may take others too."""
    generator = torch.Generator().manual_seed(11)
    for number, values in enumerate(numbers_in(case)):
        for limit in (1, 8, 1000) if len(values) == 1 else ():
            for low, high in ((-limit, 0), (0, limit), (-limit, limit)):
                step = torch.randint(low, high + 1, case[number].shape, generator=generator)
                one = torch.zeros_like(step)
                one.view(-1)[0] = low or high
                for change in (step, one):
                    changed = (case[number] + change).to(case[number].dtype)
                    yield [*case[:number], changed, *case[number + 1 :]]


def numbers_in(case: Sequence[torch.Tensor]) -> list[set[int]]:
    """The numbers in each input of integers; none for another input."""
    other = [t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in case]
    pairs = zip(case, other, strict=True)
    return [set() if skipped else set(t.flatten().tolist()) for t, skipped in pairs]


def _assignments(
    graph: Graph, example: Sequence[torch.Tensor], conditions: Iterable[Any]
) -> list[dict[str, int]]:
    """Sizes by name: those of the example, small and odd ones, and one more than each number that a
    condition compares with."""
    names = [name for name in graph.bounds if name.isidentifier()]
    if not names:
        return [{}]
    shapes = [_of_example(graph, example)]
    for shape in _SHAPES:
        values = itertools.chain(shape, itertools.repeat(shape[-1]))
        ordered = reversed(list(zip(reversed(names), reversed(shape), strict=False)))
        shapes.append({**dict(zip(names, values, strict=False)), **dict(ordered)})
    for number in sorted(_numbers(conditions)):
        if 1 <= number < MOST_ROWS:
            shapes.append(dict.fromkeys(names, 1) | {names[-1]: number + 1})
    clamped = (
        {name: _clamp(size, graph.bounds[name]) for name, size in shape.items()} for shape in shapes
    )
    distinct = {tuple(sorted(nearest_allowed(graph.bounds, shape).items())) for shape in clamped}
    return [dict(shape) for shape in sorted(distinct)]


def _of_example(graph: Graph, example: Sequence[torch.Tensor]) -> dict[str, int]:
    return {
        str(dim): size
        for value, tensor in zip(graph.inputs, example, strict=False)
        for dim, size in zip(value.shape, tensor.shape, strict=True)
        if isinstance(dim, sympy.Symbol)
    }


def _numbers(conditions: Iterable[Any]) -> set[int]:
    """The integers in conditions on data, with which counts are compared."""
    return {
        int(atom)
        for condition in conditions
        for atom in condition.atoms(sympy.Integer)
        if atom.is_Integer
    }


def _clamp(size: int, bounds: Bounds) -> int:
    size = max(size, bounds.low)
    return size if bounds.high is None else min(size, bounds.high)


@dataclass(frozen=True)
class Verdict:
    """The result of a proof.

    error: the greatest difference from eager. inputs: the shapes of the inputs at which the
    difference is too large, else empty. unproved: the branches that did not go both ways. compared:
    how often eager ran. varies: the refusal where constants in eager's result vary.
    """

    error: float
    inputs: str
    unproved: tuple[Site, ...]
    compared: int
    varies: VaryingOutput | None = None

    @property
    def agrees(self) -> bool:
        return not self.inputs


def examine(
    program: Program,
    eager: Eager,
    examples: Sequence[Sequence[torch.Tensor]],
    assumed: Assumed,
    outputs: int,
    guards: Sequence[Guard] = (),
) -> Verdict:
    """Run the program and eager on drawn inputs until they differ.

    An input on which eager itself fails, such as a size that it refuses, is skipped, and so is one
    at which they differ and a guard does not hold: guards are settled later. A side of a branch
    on which an input of integers was one number gets others there. Inputs that are not finite are
    tried where a branch is not proved by others, and prove it or nothing. A branch is proved where
    eager went both ways; or where each of its conditions, which the program evaluates though it
    always goes one way, came out both ways while the results agreed. A comparison with a size, as
    of rows with a capacity of all rows, may never come out as it was traced: then the results of
    the other way suffice. The first `outputs` outputs of the program are the module's, the others
    the readouts of `assumed`.

    Raises CaptureError where eager fails on the first example.
    """
    limit = default_tolerance(program.graph)
    conditions = [q.condition for q in assumed.questions if q.condition is not None]
    ways: Ways = {}
    outcomes: dict[int, set[bool]] = {number: set() for number in range(len(assumed.questions))}
    sides: dict[tuple[Site, int], tuple[Case, list[set[int]]]] = {}
    worst, compared = 0.0, 0

    def shown(question: Question, came_out: Set[bool]) -> bool:
        answer, condition = assumed.branches[question.site], question.condition
        sized = condition is not None and any(s in assumed.sizes for s in condition.free_symbols)
        return len(came_out) == 2 or (sized and (not answer) in came_out)

    def unproved() -> tuple[Site, ...]:
        open_sites = {q.site for n, q in enumerate(assumed.questions) if not shown(q, outcomes[n])}
        return tuple(s for s in assumed.branches if len(ways.get(s, ())) < 2 and s in open_sites)

    def run(*case: torch.Tensor) -> tuple[Ways, tuple[torch.Tensor, ...]]:
        with watched(assumed.branches) as went:
            return went, eager(*(tensor.clone() for tensor in case))

    def attempts() -> Iterator[tuple[Case, tuple[Ways, tuple[torch.Tensor, ...]], bool]]:
        try:
            yield tuple(examples[0]), run(*examples[0]), True
        except VaryingOutput:
            raise
        except Exception as failure:
            raise CaptureError(f"the model fails on its example inputs: {failure}") from failure
        for example in examples[1:]:
            yield from ((*ran, True) for ran in cases(program, example, run, ()))
        yield from ((*ran, True) for ran in draws(program, examples[0], conditions, run))
        alike = [case for case, numbers in sides.values() if any(len(n) == 1 for n in numbers)]
        for alone in alike:
            for case in other_integers(alone):
                yield from ((*ran, True) for ran in cases(program, case, run, ()))
        for case in not_finite(examples[0]) if unproved() else ():
            yield from ((*ran, False) for ran in cases(program, case, run, ()))

    try:
        for case, (went, expected), finite in attempts():
            compared += 1
            results = run_program(program, case)
            error = error_of(results[:outputs], expected)
            equal = error <= limit or same_results(program, eager, case, expected)
            if not equal and (not finite or not _hold(guards, program, case)):
                continue
            if not equal:
                return Verdict(error, shapes(case), tuple(assumed.branches), compared)
            worst = max(worst, error)
            for site, offsets in went.items():
                ways.setdefault(site, set()).update(offsets)
                for offset in offsets:
                    last, numbers = sides.get((site, offset), (case, numbers_in(case)))
                    more = [a | b for a, b in zip(numbers, numbers_in(case), strict=True)]
                    sides[site, offset] = (max(last, case, key=_elements), more)
            for number, outcome in _outcomes(assumed, case, results[outputs:]):
                outcomes[number].add(outcome)
    except VaryingOutput as why:
        return Verdict(math.inf, "the constants vary", tuple(assumed.branches), compared, why)
    return Verdict(worst, "", unproved(), compared)


def _elements(case: Case) -> int:
    return sum(tensor.numel() for tensor in case)


def _hold(guards: Sequence[Guard], program: Program, case: Sequence[torch.Tensor]) -> bool:
    """Whether all guards hold at the sizes of a case; not where the export fixed an axis at another
    size."""
    try:
        sizes = sizes_of(program, case)
    except IRError:
        return False
    return all(truth_of(guard.condition).holds(sizes) for guard in guards)


def _outcomes(
    assumed: Assumed, case: Sequence[torch.Tensor], readouts: Sequence[torch.Tensor]
) -> Iterator[tuple[int, bool]]:
    """The outcome of each question in the program, by its number; questions whose values are not
    read out are left out."""
    values = dict(zip(assumed.readouts, (int(tensor) for tensor in readouts), strict=True))
    sizes = {s: case[number].shape[axis] for s, (number, axis) in assumed.sizes.items()}
    for number, question in enumerate(assumed.questions):
        if question.condition is None:
            yield number, bool(values[number])
            continue
        outcome = question.condition.subs({**sizes, **values})
        if outcome in (True, False):
            yield number, bool(outcome)


def run_program(program: Program, case: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The program's outputs; empty where it fails although eager does not."""
    states = [program.weights[state.before.name] for state in program.graph.states]
    try:
        with torch.no_grad():
            results = evaluate_anywhere(program.graph, [*case, *states], program.weights)
            return results[: len(program.graph.outputs)]
    except (RuntimeError, IRError, IndexError, ValueError, ArithmeticError):
        return ()
