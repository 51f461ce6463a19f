"""Other right results than eager's in the model's dtype: in float32, with the first of equal values
chosen, and with the noise of rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch

from moec.capture import Captured
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.run_in_float32 import InFloat32, all_in_float32, eager_in_float32, in_float32
from moec.ir.interpret.stable_topk import FirstOfEquals
from moec.oracle.agree import with_states
from moec.oracle.cases import Eager
from moec.oracle.rounding import FLOAT32_NOISE, rows_beyond
from moec.oracle.tolerance import rounded_rows
from moec.passes.core.runner import PassResult
from moec.sources.memory.lock_step import Together, one_by_one
from moec.verify.cases import Reference
from moec.verify.comparison import Comparison, SampleErrors

LIMIT = 1e-4
"""The greatest error of a row in float32, relative to its greatest value."""
SAMPLES = 8
"""Samples of reordered sums: enough for a choice between two experts with equal scores."""
_CHOICES = 32
"""Samples of how eager chooses among nearly equal values: enough for one of five or six."""

Results: TypeAlias = tuple[torch.Tensor, ...]
Exact: TypeAlias = tuple[list[Results], bool]
"""The source's results in float32 in each case (`exact_eager`), and whether it chose another one of
equal values than the first."""


def exact_results(
    captured: Captured, answers: Sequence[Reference], together: Together = one_by_one
) -> Exact:
    choices = FirstOfEquals(notes_only=True)
    return _evaluate(choices, captured, answers, together), choices.met


def _evaluate(
    choices: FirstOfEquals, captured: Captured, answers: Sequence[Reference], together: Together
) -> list[Results]:
    if captured.is_graph:  # op by op for all cases: codes of a weight become floats once
        cases = [with_states(captured.program, case) for case, _ in answers]
        with choices, InFloat32():
            return all_in_float32(captured.program, cases)
    return together([partial(_enter, choices, run) for run in _exact_runs(captured, answers)])


def _enter(choices: FirstOfEquals, run: Callable[[], Results]) -> Results:
    with choices:  # modes are a thread's
        return run()


def exact_eager(captured: Captured, noise: float = 0.0, seed: int = 0) -> Eager:
    """The source in float32: a graph by its types, a module under a dispatch mode. `noise` is that
    of `eager_in_float32`."""
    return eager_in_float32(_typed_float32(captured), noise, seed)


def _typed_float32(captured: Captured) -> Eager:
    """The source, a graph with float32 for 16-bit floats."""
    if not captured.is_graph:
        return captured.eager
    run, program = in_float32(captured.program), captured.program
    return lambda *case: run(with_states(program, case))


def _exact_runs(
    captured: Captured,
    answers: Sequence[Reference],
    noise: float = 0.0,
    seeds: Sequence[int] = (0,),
) -> list[Callable[[], Results]]:
    """Evaluations in float32: those with `noise` of each seed, in each case."""
    source = replace(captured, eager=_typed_float32(captured), is_graph=False)
    runs = [exact_eager(source, noise, seed) for seed in seeds]
    return [partial(run, *case) for run in runs for case, _ in answers]


def stable_references(
    captured: Captured,
    answers: Sequence[Reference],
    compared: Sequence[Comparison],
    owners: Sequence[int],
    exact: Exact | None = None,
    together: Together = one_by_one,
) -> list[Comparison] | None:
    """The comparisons with one more reference each, eager with the first of equal values chosen,
    in float32 if there are `exact` results. None where that is eager's own choice. The captured
    graph is no reference, because it may be wrong."""
    pairs = zip(compared, owners, strict=True)
    if exact is not None:
        if not exact[1]:
            return None
        results = _evaluate(FirstOfEquals(), captured, answers, together)
        return [item.with_exact(results[owner]) for item, owner in pairs]
    choices = FirstOfEquals()
    runs = [partial(captured.eager, *case) for case, _ in answers]
    results = together([partial(_enter, choices, run) for run in runs])
    if not choices.met:
        return None
    return [item.with_reference(results[owner]) for item, owner in pairs]


def with_noise(
    noise: float,
    seeds: Sequence[int],
    captured: Captured,
    answers: Sequence[Reference],
    compared: Sequence[Comparison],
    owners: Sequence[int],
    together: Together = one_by_one,
) -> list[Comparison]:
    """The comparisons with more samples of how eager rounds, by relative `noise`, one a seed."""
    items = list(enumerate(zip(compared, owners, strict=True)))

    def sampled(case: int, run: Callable[[], Results]) -> dict[int, SampleErrors]:
        results = run()
        return {n: item.sample(results) for n, (item, owner) in items if owner == case}

    runs = _exact_runs(captured, answers, noise, seeds)
    samples = together([partial(sampled, n % len(answers), run) for n, run in enumerate(runs)])
    return [
        replace(item, noisy=(*item.noisy, *(errors[n] for errors in samples if n in errors)))
        for n, item in enumerate(compared)
    ]


def with_near_ties(
    captured: Captured,
    answers: Sequence[Reference],
    compared: Sequence[Comparison],
    owners: Sequence[int],
    together: Together = one_by_one,
) -> list[Comparison]:
    """The comparisons of integers, each of which is also right where eager chooses it with other
    last bits of its sums: the greatest of scores that are equal but for rounding. For a model in
    float32."""
    items = list(zip(compared, owners, strict=True))
    differing = {n for item, n in items if item.is_integer and not item.is_within(0.0)}
    left = [answers[n] for n in sorted(differing)]
    results = together(_exact_runs(captured, left, FLOAT32_NOISE, range(_CHOICES)))
    samples = {n: results[i :: len(left)] for i, n in enumerate(sorted(differing))}
    return [item.with_choices(samples.get(n, ())) if item.is_integer else item for item, n in items]


def meaning(
    captured: Captured,
    final: Program,
    answers: Sequence[Reference],
    exact: Exact,
    together: Together = one_by_one,
) -> str | None:
    """How the graph after all passes differs from eager, both in float32, where an error in a
    weight is not hidden by rounding; None where it does not."""
    results = all_in_float32(final, [with_states(final, case) for case, _ in answers])
    right, tied = exact
    beyond = rows_beyond(results, right, max(LIMIT, rounded_rows(final.graph)))
    for sample in _other_results(captured, answers, tied, together) if beyond else ():
        beyond = beyond and beyond.explained_by(sample)
        if beyond is None:
            break
    return None if beyond is None else f"of the graph in float32: {beyond}"


def _other_results(
    captured: Captured, answers: Sequence[Reference], tied: bool, together: Together
) -> Iterator[list[Results]]:
    """Other right results in float32: with constants folded in 16 bits, with the first of equal
    values chosen, and with reordered sums."""
    program = captured.program
    cases = [with_states(program, case) for case, _ in answers]
    yield all_in_float32(program, cases, folded=True)
    if tied:
        yield _evaluate(FirstOfEquals(), captured, answers, together)
    for seed in range(SAMPLES):
        yield together(_exact_runs(captured, answers, FLOAT32_NOISE, (seed,)))


def intended(captured: Captured, pass_results: Sequence[PassResult]) -> Captured:
    """What the code is to compute: the source, or where passes changed the model on purpose, the
    graph after the last of them."""
    changes = [pass_result.program for pass_result in pass_results if pass_result.changed]
    if not changes:
        return captured
    program = changes[-1]

    def eager(*case: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = evaluate(program.graph, with_states(program, case), program.weights)
        return results[: len(program.graph.outputs)]

    return replace(captured, program=program, eager=eager, is_graph=True)
