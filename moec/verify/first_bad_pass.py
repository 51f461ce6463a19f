"""Finds the first pass that changed what a model computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.capture import Captured
from moec.errors import IRError
from moec.interpret.evaluate import evaluate
from moec.interpret.run_in_float32 import eager_in_float32, folded_in_float32, in_float32
from moec.oracle.agree import error_of, with_states
from moec.oracle.rounding import meaning_excess
from moec.oracle.tolerance import rounds_to_16_bits
from moec.passes.core.runner import PassResult
from moec.runtime.checks import free_memory, show_bytes
from moec.verify.cases import Reference

_Results = tuple[torch.Tensor, ...]


def first_bad_pass(
    limit: float,
    captured: Captured,
    answers: Sequence[Reference],
    pass_results: Sequence[PassResult],
) -> str:
    """A sentence naming the first pass after which the graph differs, or the generated code.

    The captured graph is compared with eager, both in float32 where the model computes in 16 bits,
    and each later graph with the captured one in float32, because a pass may move a rounding, which
    is no error.
    """
    if not pass_results:
        return "the generated code is wrong"
    start = pass_results[0].program
    cast = 8 * sum(weight.numel() for weight in start.weights.values())
    if cast > free_memory():
        return f"which pass is wrong was not searched: that takes {show_bytes(cast)} of memory"
    inputs = [with_states(start, case) for case, _ in answers]
    try:
        references = list(map(in_float32(start), inputs))
        if rounds_to_16_bits(start.graph) and not captured.is_graph:
            eager = eager_in_float32(captured.eager)
            exact = [eager(*case) for case, _ in answers]
            wrong = _differs(references, exact, exact)
        else:
            results = [evaluate(start.graph, case, start.weights) for case in inputs]
            pairs = zip(results, answers, strict=True)
            wrong = any(not error_of(ours, right) <= limit for ours, (_, right) in pairs)
    except (IRError, RuntimeError) as error:
        return f"the graph after {pass_results[0].name} does not run: {error}"
    if wrong:
        return f"the first pass after which the graph differs is {pass_results[0].name}"
    folded: list[_Results] = []
    for pass_result in pass_results[1:]:
        try:
            results = list(map(in_float32(pass_result.program), inputs))
        except (IRError, RuntimeError) as error:
            return f"the graph after {pass_result.name} does not run: {error}"
        folded = folded or list(map(folded_in_float32(start), inputs))
        if _differs(results, references, folded):
            return f"the first pass after which the graph differs is {pass_result.name}"
    return "the graph is correct after every pass: the generated code is wrong"


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
