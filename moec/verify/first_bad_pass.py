"""Finds the first pass that changed what a model computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from moec.capture import Captured
from moec.errors import IRError
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.run_in_float32 import all_in_float32, eager_in_float32
from moec.oracle.agree import error_of, with_states
from moec.oracle.rounding import meaning_excess
from moec.oracle.tolerance import rounds_to_16_bits
from moec.passes.core.runner import PassResult
from moec.verify.cases import Reference

LOGGER = logging.getLogger(__name__)
_Results = tuple[torch.Tensor, ...]


def first_bad_pass(
    limit: float,
    captured: Captured,
    answers: Sequence[Reference],
    pass_results: Sequence[PassResult],
) -> str:
    """A sentence naming the first pass after which the graph differs, or the generated code.

    The captured graph is compared with eager, both in float32 where the model computes in 16 bits,
    and later graphs with the captured one in float32, because a pass may move a rounding, which is
    no error. The last graph is compared first; if it is wrong, the passes are halved.
    """
    if not pass_results:
        return "the generated code is wrong"
    start = pass_results[0].program
    inputs = [with_states(start, case) for case, _ in answers]
    references: list[_Results] = []
    folded: list[_Results] = []

    def captured_differs() -> bool:
        references.extend(all_in_float32(start, inputs))
        if rounds_to_16_bits(start.graph) and not captured.is_graph:
            eager = eager_in_float32(captured.eager)
            exact = [eager(*case) for case, _ in answers]
            return _differs(references, exact, exact)
        results = [evaluate(start.graph, case, start.weights) for case in inputs]
        pairs = zip(results, answers, strict=True)
        return any(not error_of(ours, right) <= limit for ours, (_, right) in pairs)

    def differs(number: int) -> bool:
        results = all_in_float32(pass_results[number].program, inputs)
        if not folded:
            folded.extend(all_in_float32(start, inputs, folded=True))
        return _differs(results, references, folded)

    def fault(number: int) -> str:
        """A sentence; empty where the graph after that pass is right."""
        name = pass_results[number].name
        detail = f"search for a wrong pass, after {name}"
        LOGGER.info("%s", detail, extra={"detail": detail})
        try:
            wrong = differs(number) if number else captured_differs()
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


def _differs(
    results: Sequence[_Results], expected: Sequence[_Results], folded: Sequence[_Results]
) -> bool:
    """Whether an output differs in float32; the new contents of states, which follow the outputs,
    are not compared. `folded` is the yardstick of `meaning_excess`."""
    outputs = min(len(expected[0]), len(results[0])) if expected else 0
    shapes = any(
        a.shape != b.shape or a.dtype != b.dtype
        for ours, right in zip(results, expected, strict=True)
        for a, b in zip(ours[:outputs], right[:outputs], strict=True)
    )
    right = [results[:outputs] for results in expected]
    return shapes or meaning_excess(results, right, folded) is not None
