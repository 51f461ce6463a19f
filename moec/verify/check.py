"""Compares a compiled model with its module, on random inputs of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moec.capture import Captured
from moec.errors import IRError, VerificationError
from moec.interpret.evaluate import evaluate
from moec.interpret.run_in_float32 import InFloat32, in_float32, wide
from moec.interpret.stable_topk import FirstOfEquals
from moec.ir.graph import Program
from moec.passes.core.runner import PassResult
from moec.report.data import MovedLine
from moec.report.quantisation import before_quantisation, moved_lines
from moec.verify.cases import Case, Reference, references, shapes
from moec.verify.comparison import Comparison, Criterion
from moec.verify.first_bad_pass import first_bad_pass, with_states

Pieces = tuple[str, Callable[[torch.Tensor], Iterable[tuple[int, torch.Tensor]]]]
"""(name, feed): the output that holds the logits, and a function that feeds token ids [B, S] in
pieces and yields the end of each piece and the logits [B, V] after it."""
Exact = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
Run = Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Checked:
    """The result of a comparison over all cases.

    `errors` has the greatest error of each output; `strays` is the number of the `rows` with a
    greater error than `tolerance` (allowed in 16 bits only, see `moec.interpret.tolerance.STRAYS`);
    `ties` is the number of rows that differ from eager's only in the choice among equal values (see
    `moec.interpret.stable_topk`). `notes` has a sentence for each case in which the module fails,
    and one where the module itself gives NaN.
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


def check(
    captured: Captured,
    run: Run,
    pass_results: Sequence[PassResult],
    tolerance: float | None = None,
    pieces: Pieces | None = None,
) -> Checked:
    """Compare `run` with eager on every case, and `pieces` where a model continues text.

    Where passes changed the model on purpose, the graph before the first of them is compared with
    eager, and `run` with the graph after the last. Raises as `_check` does.
    """
    changes = [i for i, pass_result in enumerate(pass_results) if pass_result.changed]
    if not changes:
        return _check(captured, run, pass_results, tolerance, pieces)
    before = pass_results[: changes[0]]
    _check(captured, _in_eager(before[-1].program), before, tolerance, None)
    intended = pass_results[changes[-1]].program

    def eager(*case: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = evaluate(intended.graph, with_states(intended, case), intended.weights)
        return results[: len(intended.graph.outputs)]

    changed = replace(captured, program=intended, eager=eager, is_graph=True)
    checked = _check(changed, run, pass_results[changes[-1] :], tolerance, pieces)
    exact = before_quantisation(pass_results)
    if len(exact) == len(pass_results):
        return checked
    answers, _ = references(changed)
    original = _in_eager(exact[-1].program)
    inputs = [value.name for value in captured.program.graph.inputs][: len(captured.example)]
    names = [value.name for value in intended.graph.outputs]
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
) -> Checked:
    """Compare `run` with eager on every case, and `pieces` where a model continues text.

    Raises VerificationError, naming the first pass that changed the numbers, where the error of an
    output exceeds what the criterion allows.
    """
    graph = captured.program.graph
    criterion = Criterion.of(graph, tolerance)
    names = [value.name for value in graph.outputs]
    inputs = [value.name for value in graph.inputs][: len(captured.example)]
    worst: dict[str, float] = {}
    farthest: tuple[float, str, Case] = (-1.0, "", ())
    compared: list[Comparison] = []
    owners: list[int] = []  # the number of each comparison's case
    answers, skipped = references(captured)
    for number, (case, expected) in enumerate(answers):
        actual = run(dict(zip(inputs, case, strict=True)))
        comparisons = [Comparison(actual[name], (), i) for i, name in enumerate(names)]
        if pieces is not None:
            name, fed = pieces
            comparisons += [
                Comparison(logits, (), names.index(name), stop) for stop, logits in fed(case[0])
            ]
        for item in comparisons:
            name = _name(names, item)
            item = replace(item, right=(item.of(expected),))
            worst[name] = max(worst.get(name, 0.0), item.distance)
            farthest = max(farthest, (item.distance, name, case), key=lambda entry: entry[0])
            compared.append(item)
            owners.append(number)
    try:
        right_by = _first_match(criterion, captured, answers, compared, owners)
    except (IRError, RuntimeError):  # the captured graph does not run, which first_bad_pass reports
        right_by = None
    if right_by is None:
        error, name, case = farthest
        if reason := _nan_of_eager(captured.program, answers):
            raise VerificationError(
                f"{reason}, so there is nothing to compare with: fix the model, or compile it "
                "with verify=False (--verify off)"
            )
        culprit = first_bad_pass(criterion, answers, pass_results)
        raise VerificationError(
            f"{name} differs from eager by {error:.1e} of its greatest value, and at most "
            f"{criterion.limit:.0e} is allowed (inputs {shapes(case)}); {culprit}"
        )
    strays, rows = criterion.strays(right_by)
    ties = criterion.strays(compared)[0] - strays
    if ties:
        worst = dict.fromkeys(worst, 0.0)
        for item in right_by:
            name = _name(names, item)
            worst[name] = max(worst[name], *item.errors.tolist(), 0.0)
    reason = _nan_of_eager(captured.program, answers)
    notes = (*skipped, *([reason] if reason else []))
    return Checked(worst, criterion.limit, strays, rows, ties, notes)


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


def _first_match(
    criterion: Criterion,
    captured: Captured,
    answers: Sequence[Reference],
    compared: Sequence[Comparison],
    owners: Sequence[int],
) -> Sequence[Comparison] | None:
    """The comparisons with the references that they match: eager, or eager with the first of equal
    values chosen. None if they match neither. The captured graph is no reference, because it may be
    wrong itself."""

    def with_reference(items: Sequence[Comparison], exact: Exact) -> list[Comparison]:
        results = [exact(case) for case, _ in answers]
        return [
            replace(item, right=(*item.right, item.of(results[owner]).to(item.right[0].dtype)))
            for item, owner in zip(items, owners, strict=True)
        ]

    if criterion.allows(compared):
        return compared
    # A token that eager routes to the same experts in 16 bits and in float32 must be right, even if
    # its scores are nearly tied.
    widened = _widened(captured) if criterion.share else None
    if widened is not None and criterion.allows(with_reference(compared, widened)):
        return compared
    tied = FirstOfEquals()
    right = with_reference(compared, _in_mode(tied, _eager(captured)))
    if not tied.met:
        return None
    if criterion.allows(right):
        return right
    if widened is None:
        return None
    both = with_reference(with_reference(right, widened), _in_mode(FirstOfEquals(), widened))
    return right if criterion.allows(both) else None


def _eager(captured: Captured) -> Exact:
    return lambda case: captured.eager(*case)


def _widened(captured: Captured) -> Exact:
    """The source run in float32: a graph by its types, a module under a dispatch mode."""
    if captured.is_graph:
        run = in_float32(captured.program)
        return lambda case: run(with_states(captured.program, case))
    mode = InFloat32()  # type: ignore[no-untyped-call]
    return _in_mode(mode, lambda case: captured.eager(*map(wide, case)))


def _in_mode(mode: TorchDispatchMode, exact: Exact) -> Exact:
    def run(case: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with mode:
            return exact(case)

    return run
