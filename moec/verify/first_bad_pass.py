"""Finds the first pass that changed what a model computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from moec.capture import Captured
from moec.errors import IRError
from moec.ir.interpret.run_in_float32 import all_in_float32
from moec.oracle.agree import with_states
from moec.oracle.rounding import rows_beyond
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

    Graphs are compared in float32, because a pass may move a rounding, which is no error: the
    captured one with eager, and later ones with the captured one. `answers` are in float32. The
    last graph is compared first; if it is wrong, the passes are halved.
    """
    start = pass_results[0].program
    inputs = [with_states(start, case) for case, _ in answers]
    references: list[_Results] = []
    folded: list[_Results] = []

    def captured_differs() -> bool:
        references.extend(all_in_float32(start, inputs))
        right = [results for _, results in answers]
        return not captured.is_graph and _differs(references, right, right, limit)

    def differs(number: int) -> bool:
        results = all_in_float32(pass_results[number].program, inputs)
        if not folded:
            folded.extend(all_in_float32(start, inputs, folded=True))
        return _differs(results, references, folded, limit)

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
    results: Sequence[_Results],
    expected: Sequence[_Results],
    folded: Sequence[_Results],
    limit: float,
) -> bool:
    """Whether an output differs in float32, by more than constants `folded` in 16 bits do; the new
    contents of states, which follow the outputs, are not compared."""
    outputs = min(len(expected[0]), len(results[0])) if expected else 0
    beyond = rows_beyond(results, [right[:outputs] for right in expected], limit)
    return beyond is not None and (folded is expected or beyond.explained_by(folded) is not None)
