"""Finds the first pass that changed what a model computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from moec.errors import IRError
from moec.interpret.evaluate import evaluate
from moec.interpret.run_in_float32 import MEANING, in_float32
from moec.interpret.tolerance import distance
from moec.ir.graph import Program
from moec.passes.core.runner import PassResult
from moec.verify.cases import Reference
from moec.verify.comparison import Comparison, Criterion


def first_bad_pass(
    criterion: Criterion, answers: Sequence[Reference], pass_results: Sequence[PassResult]
) -> str:
    """A sentence naming the first pass after which the graph differs, or the generated code.

    The captured graph is compared with eager in the model's dtype, each later one with the captured
    graph in float32, because a pass may move a rounding, which is no error.
    """
    if not pass_results:
        return "the generated code is wrong"
    limit = min(criterion.limit, MEANING) if not criterion.share else MEANING
    try:
        start = pass_results[0].program
        compared = [
            Comparison(actual, (value,), 0)
            for case, expected in answers
            for actual, value in _pairs(
                evaluate(start.graph, with_states(start, case), start.weights), expected
            )
        ]
        if not criterion.allows(compared):
            return f"the first pass after which the graph differs is {pass_results[0].name}"
        inputs = [with_states(start, case) for case, _ in answers]
        references = list(map(in_float32(start), inputs))
    except (IRError, RuntimeError) as error:
        return f"the graph after {pass_results[0].name} does not run: {error}"
    for pass_result in pass_results[1:]:
        try:
            outputs = map(in_float32(pass_result.program), inputs)
            if any(
                not distance(actual, value) <= limit
                for results, right in zip(outputs, references, strict=True)
                for actual, value in _pairs(results, right)
            ):
                return f"the first pass after which the graph differs is {pass_result.name}"
        except (IRError, RuntimeError) as error:
            return f"the graph after {pass_result.name} does not run: {error}"
    return "the graph is correct after every pass: the generated code is wrong"


def _pairs(
    results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of outputs; the new contents of states, which follow the outputs, are not compared."""
    return zip(results, expected, strict=False)


def with_states(program: Program, case: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [*case, *(program.weights[state.before.name] for state in program.graph.states)]
