"""Compares a compiled model with its module, on random inputs of several sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from moec.capture import Captured
from moec.errors import VerificationError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.oracle.agree import with_states
from moec.oracle.cases import Case, shapes
from moec.oracle.rounding import NOISE_SEEDS
from moec.passes.core.runner import PassResult
from moec.report.data import MovedLine
from moec.report.quantisation import before_quantisation, moved_lines
from moec.sources.memory.lock_step import Together, one_by_one
from moec.verify.cases import Reference, references
from moec.verify.codes import check_codes
from moec.verify.comparison import Comparison, Criterion
from moec.verify.first_bad_pass import first_bad_pass
from moec.verify.references import (
    exact_results,
    intended,
    meaning,
    stable_references,
    with_near_ties,
    with_noise,
)

LOGGER = logging.getLogger(__name__)
Pieces = tuple[str, Callable[[torch.Tensor], Iterable[tuple[int, torch.Tensor]]]]
"""(name, feed): the output that holds the logits, and a function that feeds token ids [B, S] in
pieces and yields the end of each piece and the logits [B, V] after it."""
Named = Mapping[str, torch.Tensor]
Run = Callable[[Mapping[str, Any]], Named]
_RunAll = Callable[[Sequence[Case]], Iterable[Named]]
_Evaluated = tuple[Case, tuple[torch.Tensor, ...], Named]
"""Inputs, the module's results, and those that were compared with them."""


FEW = 3
"""Cases in which each kernel is compared too: the example, and the first draws of its sizes."""


@dataclass(frozen=True)
class _How:
    """`check` with these of its arguments."""

    tolerance: float | None
    empty: bool
    together: Together


@dataclass(frozen=True)
class Checked:
    """The result of a comparison over all cases.

    `errors` has the greatest error of each output, against eager in float32 where the model
    computes in 16 bits; `strays` is the number of the `rows` with a greater error than `tolerance`,
    and `eager_strays` that of eager and of samples of its rounding, the yardstick there
    (`moec.oracle.rounding`); `ties` is the number of rows that differ from eager's only in the
    choice among equal values (see `moec.ir.interpret.stable_topk`). `notes` has a
    sentence for each case in which the module fails, and one where the module itself gives NaN.
    `moved` is the distance of quantised outputs from the exact ones; `errors` are then relative to
    the quantised graph. With `layers`, all cases were evaluated together, layer by layer. `cases`
    are the first of them. `kernels` says how the kernels were compared (`moec.verify.code`).
    """

    errors: Mapping[str, float]
    tolerance: float
    strays: int = 0
    rows: int = 0
    ties: int = 0
    notes: tuple[str, ...] = ()
    moved: tuple[MovedLine, ...] = ()
    eager_strays: int = 0
    layers: bool = False
    cases: tuple[Case, ...] = ()
    kernels: str = ""


def check(
    captured: Captured,
    run: Run,
    pass_results: Sequence[PassResult],
    tolerance: float | None = None,
    pieces: Pieces | None = None,
    *,
    empty: bool = True,
    together: Together = one_by_one,
) -> Checked:
    """Compare `run` with eager on every case, and `pieces` where a model continues text. `empty`
    is False where `run` takes no inputs without elements. `together` evaluates eager and graphs.

    Where passes changed the model on purpose, the graph before the first of them is compared with
    eager, and `run` with the graph after the last. Raises VerificationError, naming the first pass
    that changed the numbers, where the error of an output exceeds what the criterion allows, also
    if eager and graphs are evaluated for one case after the other.
    """
    how = _How(tolerance, empty, together)
    try:
        checked = _check_all(captured, run, pass_results, pieces, how)
        return replace(checked, layers=together is not one_by_one)
    except VerificationError:
        if together is one_by_one:
            raise
    how = replace(how, together=one_by_one)
    checked = _check_all(captured, run, pass_results, pieces, how)
    note = "eager ran for one input after the other: layer by layer it gives other results"
    return replace(checked, notes=(*checked.notes, note))


def _check_all(
    captured: Captured,
    run: Run,
    pass_results: Sequence[PassResult],
    pieces: Pieces | None,
    how: _How,
) -> Checked:
    inputs = [value.name for value in captured.program.graph.inputs][: len(captured.example)]

    def run_all(cases: Sequence[Case]) -> Iterator[Named]:
        for case in cases:
            yield run(dict(zip(inputs, case, strict=True)))

    changes = [i for i, pass_result in enumerate(pass_results) if pass_result.changed]
    if not changes:
        return _check(captured, run_all, pass_results, pieces, how)[0]
    check_codes(pass_results)
    before, exact = pass_results[: changes[0]], before_quantisation(pass_results)
    evaluate = _in_eager(before[-1].program, how.together)
    _, evaluated = _check(captured, evaluate, before, None, replace(how, empty=True))
    changed = intended(captured, pass_results)
    checked, outcomes = _check(changed, run_all, pass_results[changes[-1] :], pieces, how)
    if len(exact) == len(pass_results):
        return checked
    if exact[-1].program is not before[-1].program:
        evaluate, evaluated = _in_eager(exact[-1].program, how.together), []
    rows = [outcome for outcome in outcomes if any(tensor.numel() for tensor in outcome[1])]
    originals = _reused(evaluate, evaluated)([case for case, _, _ in rows])
    names = [value.name for value in changed.program.graph.outputs]
    expected = [[results[name] for name in names] for results in originals]
    return replace(checked, moved=moved_lines(names, expected, [right for _, right, _ in rows]))


def _in_eager(program: Program, together: Together) -> _RunAll:
    """A function that evaluates the program op by op, with outputs by name."""

    def run(case: Case) -> Named:
        results = evaluate(program.graph, with_states(program, case), program.weights)
        return {v.name: t for v, t in zip(program.graph.outputs, results, strict=False)}

    return lambda cases: together([partial(run, case) for case in cases])


def _reused(run: _RunAll, evaluated: Sequence[_Evaluated]) -> _RunAll:
    """`run` of the cases that it was not yet run for."""

    def find(case: Case) -> Named | None:
        return next((n for other, _, n in evaluated if all(map(torch.equal, case, other))), None)

    def run_rest(cases: Sequence[Case]) -> Iterator[Named]:
        rest = iter(run([case for case in cases if find(case) is None]))
        return (find(case) or next(rest) for case in cases)

    return run_rest


def _check(
    captured: Captured,
    run_all: _RunAll,
    pass_results: Sequence[PassResult],
    pieces: Pieces | None,
    how: _How,
) -> tuple[Checked, list[_Evaluated]]:
    """Compare `run_all` with eager on every case, and `pieces` where a model continues text.

    Raises VerificationError, naming the first pass that changed the numbers, where the error of an
    output exceeds what the criterion allows.
    """
    graph, together = captured.program.graph, how.together
    criterion = Criterion.of(graph, how.tolerance)
    names = [value.name for value in graph.outputs]
    say("eager")
    answers, skipped = references(captured, empty=how.empty, together=together)
    say(f"the code with {len(answers)} inputs")
    actual = run_all([case for case, _ in answers])
    compared, owners, evaluated = _compared(names, actual, pieces, answers)
    reason = _nan_of_eager(captured.program, answers)
    say("eager in float32")
    exact = exact_results(captured, answers, together) if criterion.unit else None
    if exact is not None:
        right, _ = exact
        compared = [item.with_exact(right[n]) for item, n in zip(compared, owners, strict=True)]
    right_by, why = compared, criterion.refusal(compared)
    if why is not None:
        stable = stable_references(captured, answers, compared, owners, exact, together)
        right_by, why = (compared, why) if stable is None else (stable, criterion.refusal(stable))
    if criterion.unit:
        for seeds in NOISE_SEEDS if why else ():
            say(f"how eager rounds, samples {seeds[0] + 1} to {seeds[-1] + 1}")
            right_by = with_noise(
                criterion.noise, seeds, captured, answers, right_by, owners, together
            )
            why = criterion.refusal(right_by)
            if why is None:
                break
    elif why is not None and any(not t.is_floating_point() for _, r in answers for t in r):
        right_by = with_near_ties(captured, answers, right_by, owners, together)
        why = criterion.refusal(right_by)
    if why is None and exact is not None and pass_results and not captured.is_graph:
        say("the graph in float32")
        why = meaning(captured, pass_results[-1].program, answers, exact, together)
    if why is not None:
        filled = [answer for answer in answers if all(map(torch.Tensor.numel, answer[0]))]
        if nan := _nan_of_eager(captured.program, filled):
            raise VerificationError(
                f"{nan}, so there is nothing to compare with: fix the model, or compile it "
                "with verify=False (--verify off)"
            )
        worst = max(range(len(compared)), key=lambda n: compared[n].distance)
        case, _ = answers[owners[worst]]
        if together is not one_by_one:
            raise VerificationError("to be repeated for one case after the other")
        culprit = first_bad_pass(criterion.limit, captured, answers, pass_results)
        words = why or (
            f"differs from eager by {compared[worst].distance:.1e} of its greatest value, and at "
            f"most {criterion.limit:.0e} is allowed"
        )
        name = _name(names, compared[worst])
        raise VerificationError(f"{name} {words} (inputs {shapes(case)}); {culprit}")
    strays, rows = criterion.strays(right_by)
    ties = criterion.strays(compared)[0] - strays
    eager_strays = criterion.eager_strays(right_by)
    errors: dict[str, float] = {}
    for before, item in zip(compared, right_by, strict=True):
        name = _name(names, item)
        error = float(item.errors.max()) if ties and len(item.errors) else before.distance
        errors[name] = max(errors.get(name, 0.0), error)
    notes = (*skipped, *([reason] if reason else []))
    cases = tuple(case for case, _ in answers[:FEW])
    checked = Checked(
        errors, criterion.limit, strays, rows, ties, notes, eager_strays=eager_strays, cases=cases
    )
    return checked, evaluated


def say(detail: str) -> None:
    """What is compared now, for those who wait."""
    LOGGER.debug("verify: %s", detail, extra={"detail": detail})


def _compared(
    names: Sequence[str],
    actual: Iterable[Named],
    pieces: Pieces | None,
    answers: Sequence[Reference],
) -> tuple[list[Comparison], list[int], list[_Evaluated]]:
    """The `actual` results and those of `pieces` with eager's, the number of each one's case, and
    what was compared."""
    compared: list[Comparison] = []
    owners: list[int] = []
    evaluated: list[_Evaluated] = []
    for number, ((case, expected), named) in enumerate(zip(answers, actual, strict=True)):
        evaluated.append((case, expected, named))
        items = [Comparison(named[name], (), i) for i, name in enumerate(names)]
        if pieces is not None:
            name, fed = pieces
            items += [
                Comparison(logits, (), names.index(name), stop) for stop, logits in fed(case[0])
            ]
        compared += [item.with_reference(expected) for item in items]
        owners += [number] * len(items)
    return compared, owners, evaluated


def _nan_of_eager(program: Program, answers: Sequence[Reference]) -> str:
    """A sentence where eager itself returns NaN, which code may have elsewhere; otherwise "".

    It names the first weight that holds NaN or infinity.
    """
    for case, expected in answers:
        outputs = (tensor for tensor in expected if tensor.is_floating_point())
        if not any(tensor.isnan().any() for tensor in outputs):
            continue
        weights = [
            name
            for name, tensor in program.weights.items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
        cause = f": its weight {weights[0]} holds NaN or infinity" if weights else ""
        return f"the model itself gives NaN (inputs {shapes(case)}){cause}"
    return ""


def _name(names: Sequence[str], item: Comparison) -> str:
    return names[item.output] + (" in pieces" if item.stop is not None else "")
