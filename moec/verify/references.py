"""Right results: eager's in float32, those of the graph that passes are to keep, and others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch

from moec.capture import Captured
from moec.errors import IRError
from moec.ir.graph import Program
from moec.ir.interpret.run_in_float32 import all_in_float32, eager_in_float32, in_float32
from moec.ir.interpret.stable_topk import FirstOfEquals
from moec.oracle.agree import with_states
from moec.oracle.cases import Case, Eager
from moec.oracle.rounding import FLOAT32_NOISE, UNIT, RowsBeyond, rows_beyond
from moec.oracle.tolerance import computed_dtypes, rounded_rows
from moec.passes.core.runner import PassResult
from moec.sources.memory.lock_step import Together, one_by_one
from moec.verify.cases import Reference

LOGGER = logging.getLogger(__name__)

LIMIT = 1e-4
"""The greatest error of a row in float32, relative to its greatest value."""
SAMPLES = 8
"""Samples of reordered sums: enough for a choice between two experts with equal scores."""

Results: TypeAlias = tuple[torch.Tensor, ...]


def exact_eager(captured: Captured, noise: float = 0.0, seed: int = 0) -> Eager:
    """The source in float32: a graph by its types, a module under a dispatch mode. `noise` is that
    of `eager_in_float32`."""
    if not captured.is_graph:
        return eager_in_float32(captured.eager, noise, seed)
    run, program = in_float32(captured.program), captured.program

    def graph(*case: torch.Tensor) -> Results:
        return run(with_states(program, case))

    return eager_in_float32(graph, noise, seed) if noise else graph


def _with_first(run: Callable[[], Results]) -> Results:
    with FirstOfEquals():  # modes are a thread's
        return run()


def other_results(
    captured: Captured,
    cases: Sequence[Case],
    noise: float = FLOAT32_NOISE,
    samples: int = SAMPLES,
    together: Together = one_by_one,
) -> Iterator[list[Results]]:
    """Other right results in float32: with the first of equal values chosen, with sums that are off
    by relative `noise`, and in a model of 16 bits with constants folded in them. Elsewhere the
    captured graph is no reference, because it may be wrong."""
    program, exact = captured.program, exact_eager(captured)
    if not UNIT.keys().isdisjoint(computed_dtypes(program.graph)):
        yield all_in_float32(program, [with_states(program, case) for case in cases], folded=True)
    yield together([partial(_with_first, partial(exact, *case)) for case in cases])
    for seed in range(samples):
        yield together([partial(exact_eager(captured, noise, seed), *case) for case in cases])


def meaning(
    captured: Captured,
    final: Program,
    cases: Sequence[Case],
    right: Sequence[Results],
    limit: float = LIMIT,
    together: Together = one_by_one,
    samples: int = SAMPLES,
) -> RowsBeyond | None:
    """The rows of a graph that are not the source's, both in float32, where an error in a weight is
    not hidden by rounding; None without any."""
    results = all_in_float32(final, [with_states(final, case) for case in cases])
    beyond = rows_beyond(results, right, max(limit, rounded_rows(final.graph)))
    others = other_results(captured, cases, samples=samples, together=together)
    while beyond is not None and (sample := next(others, None)) is not None:
        beyond = beyond.explained_by(sample)
    return beyond


def intended(captured: Captured, pass_results: Sequence[PassResult]) -> Captured:
    """What the code is to compute: the source, or where passes changed the model on purpose, the
    graph after the last of them, which `exact_eager` then evaluates."""
    changes = [pass_result.program for pass_result in pass_results if pass_result.changed]
    return replace(captured, program=changes[-1], is_graph=True) if changes else captured


def bad_pass(
    limit: float,
    captured: Captured,
    answers: Sequence[Reference],
    pass_results: Sequence[PassResult],
) -> str:
    """A sentence naming the first pass after which the graph differs, or the generated code.

    Graphs are compared in float32, because a pass may move a rounding, which is no error. `answers`
    are in float32. The last graph is compared first; if it is wrong, the passes are halved.
    """
    cases, expected = [case for case, _ in answers], [results for _, results in answers]

    def fault(number: int) -> str:
        """A sentence; empty where the graph after that pass is right."""
        name, program = pass_results[number].name, pass_results[number].program
        detail = f"search for a wrong pass, after {name}"
        LOGGER.info("%s", detail, extra={"detail": detail})
        try:
            wrong = meaning(captured, program, cases, expected, limit, samples=0)
        except (IRError, RuntimeError) as error:
            return f"the graph after {name} does not run: {error}"
        return f"the first pass after which the graph differs is {name}" if wrong else ""

    right, wrong = 0, len(pass_results) - 1
    first = fault(0)
    sentence = first or (fault(wrong) if wrong else "")
    while not first and sentence and wrong - right > 1:
        middle = (right + wrong) // 2
        earlier = fault(middle)
        right, wrong, sentence = (right, middle, earlier) if earlier else (middle, wrong, sentence)
    return sentence or "the graph is correct after every pass: the generated code is wrong"
