"""Other right results than eager's in the model's dtype: in float32, with the first of equal values
chosen, and with the noise of rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moec.capture import Captured
from moec.interpret.evaluate import evaluate
from moec.interpret.run_in_float32 import eager_in_float32, folded_in_float32, in_float32
from moec.interpret.stable_topk import FirstOfEquals
from moec.ir.graph import Program
from moec.oracle.agree import with_states
from moec.oracle.cases import Eager
from moec.oracle.rounding import SAMPLES, meaning_excess
from moec.oracle.tolerance import rounded_rows
from moec.passes.core.runner import PassResult
from moec.verify.cases import Reference
from moec.verify.comparison import Comparison, Criterion

_MOST_CAST = 1 << 29
"""The most weights of a graph that are cast to float32 at once, 2 GiB."""


def exact_results(
    captured: Captured, answers: Sequence[Reference], noise: float = 0.0, seed: int = 0
) -> list[tuple[torch.Tensor, ...]]:
    """The source's results in float32 in each case, see `exact_eager`."""
    run = exact_eager(captured, noise, seed)
    return [run(*case) for case, _ in answers]


def exact_eager(captured: Captured, noise: float = 0.0, seed: int = 0) -> Eager:
    """The source in float32: a graph by its types, a module under a dispatch mode. `noise` is that
    of `eager_in_float32`."""
    if not captured.is_graph:
        return eager_in_float32(captured.eager, noise, seed)
    run, program = in_float32(captured.program), captured.program
    return eager_in_float32(lambda *case: run(with_states(program, case)), noise, seed)


def stable_references(
    criterion: Criterion,
    captured: Captured,
    answers: Sequence[Reference],
    compared: Sequence[Comparison],
    owners: Sequence[int],
) -> list[Comparison] | None:
    """The comparisons with one more reference each, eager with the first of equal values chosen.
    None where no values are equal. The captured graph is no reference, because it may be wrong."""
    tied = FirstOfEquals()
    with tied:
        if criterion.unit:
            results = exact_results(captured, answers)
        else:
            results = [captured.eager(*case) for case, _ in answers]
    if not tied.met:
        return None
    pairs = zip(compared, owners, strict=True)
    if criterion.unit:
        return [item.with_exact(results[owner]) for item, owner in pairs]
    return [item.with_reference(results[owner]) for item, owner in pairs]


def with_noise(
    noise: float,
    captured: Captured,
    answers: Sequence[Reference],
    compared: Sequence[Comparison],
    owners: Sequence[int],
) -> list[Comparison]:
    """The comparisons with more samples of how eager rounds, by relative `noise`."""
    result = list(compared)
    for seed in range(SAMPLES):
        noisy = exact_results(captured, answers, noise, seed)
        result = [item.with_noisy(noisy[n]) for item, n in zip(result, owners, strict=True)]
    return result


def meaning(
    captured: Captured,
    final: Program,
    answers: Sequence[Reference],
    exact: Sequence[tuple[torch.Tensor, ...]],
) -> tuple[str | None, tuple[str, ...]]:
    """How the graph after all passes differs from eager, both in float32, where an error in a
    weight is not hidden by rounding; and a note where its weights are too many to be cast."""
    elements = sum(weight.numel() for weight in final.weights.values())
    if elements > _MOST_CAST:
        return None, (
            f"the graph of {elements / 1e9:.1f} billion weights was not compared in float32 (above "
            f"{_MOST_CAST / 1e9:.1f} billion); the code was, against eager in float32",
        )
    run = in_float32(final)
    results = [run(with_states(final, case)) for case, _ in answers]
    unit = rounded_rows(final.graph)
    more = meaning_excess(results, exact, exact, unit)
    if more is not None:
        with FirstOfEquals() as tied:
            stable = exact_results(captured, answers)
        fold = folded_in_float32(captured.program)
        folded = [fold(with_states(captured.program, case)) for case, _ in answers]
        more = meaning_excess(results, stable if tied.met else exact, folded, unit)
    return (None if more is None else f"of the graph in float32: {more}"), ()


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
