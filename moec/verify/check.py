"""Compares a compiled model with its module, on random inputs of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.capture import Captured
from moec.errors import VerificationError
from moec.interpret.evaluate import evaluate
from moec.ir.graph import Program
from moec.oracle.agree import with_states
from moec.oracle.cases import shapes
from moec.passes.core.runner import PassResult
from moec.report.data import MovedLine
from moec.report.quantisation import before_quantisation, moved_lines
from moec.verify.cases import Reference, references
from moec.verify.comparison import Comparison, Criterion
from moec.verify.first_bad_pass import first_bad_pass
from moec.verify.references import (
    exact_results,
    intended,
    meaning,
    stable_references,
    with_noise,
)

Pieces = tuple[str, Callable[[torch.Tensor], Iterable[tuple[int, torch.Tensor]]]]
"""(name, feed): the output that holds the logits, and a function that feeds token ids [B, S] in
pieces and yields the end of each piece and the logits [B, V] after it."""
Run = Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Checked:
    """The result of a comparison over all cases.

    `errors` has the greatest error of each output, against eager in float32 where the model
    computes in 16 bits; `strays` is the number of the `rows` with a greater error than `tolerance`,
    and `eager_strays` that of eager and of samples of its rounding, the yardstick there
    (`moec.oracle.rounding`); `ties` is the number of rows that differ from eager's only in the
    choice among equal values (see `moec.interpret.stable_topk`). `notes` has a
    sentence for each case in which the module fails, and one where the module itself gives NaN.
    `moved` is the distance of quantised outputs from the exact ones; `errors` are then relative to
    the quantised graph.
    """

    errors: Mapping[str, float]
    tolerance: float
    strays: int = 0
    rows: int = 0
    ties: int = 0
    notes: tuple[str, ...] = ()
    moved: tuple[MovedLine, ...] = ()
    eager_strays: int = 0


def check(
    captured: Captured,
    run: Run,
    pass_results: Sequence[PassResult],
    tolerance: float | None = None,
    pieces: Pieces | None = None,
    *,
    empty: bool = True,
) -> Checked:
    """Compare `run` with eager on every case, and `pieces` where a model continues text. `empty`
    is False where `run` takes no inputs without elements.

    Where passes changed the model on purpose, the graph before the first of them is compared with
    eager, and `run` with the graph after the last. Raises as `_check` does.
    """
    changes = [i for i, pass_result in enumerate(pass_results) if pass_result.changed]
    if not changes:
        return _check(captured, run, pass_results, tolerance, pieces, empty)
    before = pass_results[: changes[0]]
    _check(captured, _in_eager(before[-1].program), before, tolerance, None)
    changed = intended(captured, pass_results)
    checked = _check(changed, run, pass_results[changes[-1] :], tolerance, pieces, empty)
    exact = before_quantisation(pass_results)
    if len(exact) == len(pass_results):
        return checked
    answers, _ = references(changed, empty=empty)
    original = _in_eager(exact[-1].program)
    inputs = [value.name for value in captured.program.graph.inputs][: len(captured.example)]
    names = [value.name for value in changed.program.graph.outputs]
    originals = [original(dict(zip(inputs, case, strict=True))) for case, _ in answers]
    return replace(
        checked,
        moved=moved_lines(
            names, [[f[n] for n in names] for f in originals], [e for _, e in answers]
        ),
    )


def _in_eager(program: Program) -> Run:
    """A function that evaluates the program op by op, with inputs and outputs by name."""
    names = [value.name for value in program.graph.inputs]
    states = {state.before.name for state in program.graph.states}

    def run(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        case = [inputs[name] for name in names if name not in states]
        results = evaluate(program.graph, with_states(program, case), program.weights)
        return {v.name: t for v, t in zip(program.graph.outputs, results, strict=False)}

    return run


def _check(
    captured: Captured,
    run: Run,
    pass_results: Sequence[PassResult],
    tolerance: float | None,
    pieces: Pieces | None,
    empty: bool = True,
) -> Checked:
    """Compare `run` with eager on every case, and `pieces` where a model continues text.

    Raises VerificationError, naming the first pass that changed the numbers, where the error of an
    output exceeds what the criterion allows.
    """
    graph = captured.program.graph
    criterion = Criterion.of(graph, tolerance)
    names = [value.name for value in graph.outputs]
    answers, skipped = references(captured, empty=empty)
    compared, owners = _compared(captured, run, pieces, answers)
    reason = _nan_of_eager(captured.program, answers)
    if criterion.unit:
        exact = exact_results(captured, answers)
        compared = [item.with_exact(exact[n]) for item, n in zip(compared, owners, strict=True)]
    right_by, why = compared, criterion.refusal(compared)
    if why is not None:
        stable = stable_references(criterion, captured, answers, compared, owners)
        right_by, why = (compared, why) if stable is None else (stable, criterion.refusal(stable))
    if why and criterion.unit:
        right_by = with_noise(criterion.noise, captured, answers, right_by, owners)
        why = criterion.refusal(right_by)
    if why is None and criterion.unit and pass_results and not captured.is_graph:
        why, note = meaning(captured, pass_results[-1].program, answers, exact)
        skipped = (*skipped, *note)
    if why is not None:
        if reason:
            raise VerificationError(
                f"{reason}, so there is nothing to compare with: fix the model, or compile it "
                "with verify=False (--verify off)"
            )
        worst = max(range(len(compared)), key=lambda n: compared[n].distance)
        case, _ = answers[owners[worst]]
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
    return Checked(errors, criterion.limit, strays, rows, ties, notes, eager_strays=eager_strays)


def _compared(
    captured: Captured, run: Run, pieces: Pieces | None, answers: Sequence[Reference]
) -> tuple[list[Comparison], list[int]]:
    """The results of `run` and of `pieces` with eager's, and the number of each one's case."""
    graph = captured.program.graph
    names = [value.name for value in graph.outputs]
    inputs = [value.name for value in graph.inputs][: len(captured.example)]
    compared: list[Comparison] = []
    owners: list[int] = []
    for number, (case, expected) in enumerate(answers):
        actual = run(dict(zip(inputs, case, strict=True)))
        items = [Comparison(actual[name], (), i) for i, name in enumerate(names)]
        if pieces is not None:
            name, fed = pieces
            items += [
                Comparison(logits, (), names.index(name), stop) for stop, logits in fed(case[0])
            ]
        compared += [item.with_reference(expected) for item in items]
        owners += [number] * len(items)
    return compared, owners


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
