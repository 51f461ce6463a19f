"""Compares a compiled model with its module, on random inputs of several sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from moec.capture import Captured
from moec.errors import VerificationError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Graph, Program, Value
from moec.ir.interpret.run_in_float32 import all_in_float32
from moec.oracle.agree import with_states
from moec.oracle.cases import Case, shapes
from moec.oracle.rounding import FLOAT32_NOISE, NOISE, UNIT, errors_of_rows, real_parts, rows_beyond
from moec.oracle.tolerance import TOLERANCES, computed_dtypes, distance, rounded_rows
from moec.passes.core.runner import PassResult
from moec.report.data import MovedLine
from moec.report.quantisation import before_quantisation, moved_lines
from moec.sources.memory.lock_step import Together, one_by_one
from moec.verify.cases import Reference, references
from moec.verify.codes import check_codes
from moec.verify.references import LIMIT, bad_pass, exact_eager, intended, meaning, other_results
from moec.verify.replay import choices, replayed, replayed_as_is, usual, wrong_choices

LOGGER = logging.getLogger(__name__)
Pieces = tuple[str, Callable[[torch.Tensor], Iterable[tuple[int, torch.Tensor]]]]
"""(name, feed): the output that holds the logits, and a function that feeds token ids [B, S] in
pieces and yields the end of each piece and the logits [B, V] after it."""
Named = Mapping[str, torch.Tensor]
Run = Callable[[Mapping[str, Any]], Named]
Results = tuple[torch.Tensor, ...]

FEW = 3
"""Cases in which each kernel is compared too: the example, and the first draws of its sizes."""
_SAMPLES = 32
"""Samples of how eager rounds, where the choices of the code are not known."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of the code that is compared: `written` has what they wrote in the last run, by
    the names of the graph's values, and `decide` compares each of them in a case, and raises
    VerificationError where one is wrong."""

    written: Callable[[], Named]
    decide: Callable[[Case], None]


@dataclass(frozen=True)
class Checked:
    """The result of a comparison over all cases.

    `errors` has the greatest error of each output against the graph in float32, with the choices
    of the code, and `tolerance` the greatest that was allowed. `notes` has a sentence for each case
    in which the module fails, and one where the module itself gives NaN. `moved` is the distance of
    quantised outputs from the exact ones; `errors` are then relative to the quantised graph. With
    `layers`, all cases were evaluated together, layer by layer. `cases` are the first of them.
    `questions` are the lines of the report, one for each question that was asked.
    """

    errors: Mapping[str, float]
    tolerance: float
    notes: tuple[str, ...] = ()
    moved: tuple[MovedLine, ...] = ()
    layers: bool = False
    cases: tuple[Case, ...] = ()
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Checking:
    """A comparison of code with `final`, the last graph, which is that of `source`."""

    source: Captured
    final: Program
    cases: Sequence[Case]
    right: Sequence[Results]
    tolerance: float | None
    kernels: Kernels | None
    together: Together
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [value.name for value in self.source.program.graph.outputs]


def check(
    captured: Captured,
    run: Run | None,
    pass_results: Sequence[PassResult],
    tolerance: float | None = None,
    pieces: Pieces | None = None,
    *,
    kernels: Kernels | None = None,
    empty: bool = True,
    together: Together = one_by_one,
) -> Checked:
    """Compare the graph after all passes with eager, both in float32, and `run` with this graph, on
    every case, and `pieces` where a model continues text. Where `kernels` are known the graph makes
    the choices of the code; elsewhere another right result must explain a row that differs. Without
    `run` the graph alone is compared. `empty` is False where `run` takes no inputs
    without elements. `together` evaluates eager and graphs.

    Where passes changed the model on purpose, the graph before the first of them is compared with
    eager, and the last one with the graph after them. Raises VerificationError, naming the first
    pass that changed the numbers, where an error exceeds what is allowed, also if eager and graphs
    are evaluated for one case after the other.
    """
    compare = partial(_check, captured, run, pass_results, tolerance, pieces, kernels, empty)
    if together is one_by_one:
        return compare(together)
    try:
        return replace(compare(together), layers=True)
    except VerificationError:
        checked = compare(one_by_one)
    note = "eager ran for one input after the other: layer by layer it gives other results"
    return replace(checked, notes=(*checked.notes, note))


def _check(
    captured: Captured,
    run: Run | None,
    pass_results: Sequence[PassResult],
    tolerance: float | None,
    pieces: Pieces | None,
    kernels: Kernels | None,
    empty: bool,
    together: Together,
) -> Checked:
    say("eager in float32")
    wide = replace(captured, eager=exact_eager(captured))
    answers, skipped = references(wide, empty=empty, together=together)
    cases, right = [case for case, _ in answers], [results for _, results in answers]
    nan = _nan_of_eager(captured.program, answers)
    say("the graph in float32")
    changes = [i for i, pass_result in enumerate(pass_results) if pass_result.changed]
    before = pass_results[: changes[0]] if changes else pass_results
    limit = max(LIMIT, tolerance or 0.0)
    _check_meaning(captured, before, answers, limit, together)
    source = intended(captured, pass_results)
    moved: tuple[MovedLine, ...] = ()
    if changes:
        check_codes(pass_results)
        inputs = [with_states(source.program, case) for case in cases]
        before_right, right = right, all_in_float32(source.program, inputs)
        changed = list(zip(cases, right, strict=True))
        _check_meaning(source, pass_results[changes[-1] :], changed, limit, together)
        moved = _moved(captured, pass_results, pass_results[changes[0] - 1], before_right, changed)
    notes = (*skipped, *([nan] if nan else []))
    questions = (f"graph: right in float32 with {len(cases)} inputs, each row to {limit:.0e}",)
    if run is None:
        return Checked({}, limit, notes, moved, questions=questions)
    final = pass_results[-1].program if pass_results else captured.program
    say(f"the code with {len(cases)} inputs")
    checking = _Checking(source, final, cases, right, tolerance, kernels, together)
    try:
        errors, allowed = _check_code(checking, run, pieces)
    except VerificationError as error:
        filled = [answer for answer in answers if all(map(torch.Tensor.numel, answer[0]))]
        if nan := _nan_of_eager(captured.program, filled):
            raise VerificationError(_NOTHING.format(nan)) from None
        raise error
    notes += tuple(checking.notes)
    return Checked(errors, allowed, notes, moved, cases=tuple(cases[:FEW]), questions=questions)


_NOTHING = (
    "{}, so there is nothing to compare with: fix the model, or compile it with verify=False "
    "(--verify off)"
)

_AGAIN = "to be repeated for one case after the other"


def _check_meaning(
    source: Captured,
    pass_results: Sequence[PassResult],
    answers: Sequence[Reference],
    limit: float,
    together: Together,
) -> None:
    """Raises VerificationError where the last graph is not the source's, both in float32."""
    if not pass_results or (source.is_graph and pass_results[-1].program is source.program):
        return
    cases, right = [case for case, _ in answers], [results for _, results in answers]
    beyond = meaning(source, pass_results[-1].program, cases, right, limit, together)
    if beyond is None:
        return
    if nan := _nan_of_eager(source.program, [a for a in answers if all(t.numel() for t in a[0])]):
        raise VerificationError(_NOTHING.format(nan))
    if together is not one_by_one:
        raise VerificationError(_AGAIN)
    name = source.program.graph.outputs[beyond.number or 0].name
    culprit = bad_pass(limit, source, answers, pass_results)
    raise VerificationError(f"{name} of the graph in float32 {beyond}; {culprit}")


def _moved(
    captured: Captured,
    pass_results: Sequence[PassResult],
    first: PassResult,
    right: Sequence[Results],
    changed: Sequence[Reference],
) -> tuple[MovedLine, ...]:
    """How far codes move outputs, in float32."""
    exact = before_quantisation(pass_results)
    if len(exact) == len(pass_results):
        return ()
    program = exact[-1].program
    if program is not first.program:
        right = all_in_float32(program, [with_states(program, case) for case, _ in changed])
    names = [value.name for value in captured.program.graph.outputs]
    filled = [n for n, (_, results) in enumerate(changed) if any(t.numel() for t in results)]
    pairs = [(right[n][: len(names)], changed[n][1][: len(names)]) for n in filled]
    return moved_lines(names, [a for a, _ in pairs], [b for _, b in pairs])


def _check_code(
    checking: _Checking, run: Run, pieces: Pieces | None
) -> tuple[dict[str, float], float]:
    """The greatest error of each output, and the greatest that is allowed. Raises
    VerificationError."""
    names, graph = checking.names, checking.final.graph
    inputs = [value.name for value in checking.source.program.graph.inputs]
    ours, stops, chosen = list[Results](), list[list[int]](), list[Named]()
    traced = checking.kernels is not None and checking.tolerance is None
    for case in checking.cases:
        named = run(dict(zip(inputs, case, strict=False)))
        written = checking.kernels.written() if checking.kernels else {}
        for name, output in zip(names, graph.outputs, strict=False):
            traced &= _is_written(graph, output, named[name], written, checking.tolerance)
        chosen.append(choices(graph, written))
        fed = list(pieces[1](case[0])) if pieces else []
        stops.append([stop for stop, _ in fed])
        ours.append((*(named[name] for name in names), *_joined([t for _, t in fed])))
    at = names.index(pieces[0]) if pieces else 0

    def with_pieces(results: Results, number: int) -> Results:
        fed = [results[at][:, stop - 1] for stop in stops[number]]
        return (*results[: len(names)], *_joined(fed))

    unit = max((UNIT.get(dtype, 0.0) for dtype in computed_dtypes(graph)), default=0.0)
    replays = unit > 0 and any(chosen)  # in float32 the code's own choices are compared too
    by_case = replayed(checking.final, checking.cases, chosen) if replays else []
    exact = [results for results, _ in by_case] or checking.right
    exact = [with_pieces(results, n) for n, results in enumerate(exact)]
    few = [n for n, r in enumerate(ours) if n < FEW or not all(t.isfinite().all() for t in r)]
    few = few if unit else []
    runs = [partial(replayed_as_is, checking.final, checking.cases[n], chosen[n]) for n in few]
    low = dict(zip(few, checking.together(runs), strict=True))
    rounded = {n: with_pieces(results, n) for n, (results, _) in low.items()}
    limits = _limits(checking, unit, rounded, exact)
    errors = dict.fromkeys([*names, f"{names[at]} in pieces"][: max(map(len, ours))], 0.0)
    for n in range(len(ours)):
        right = _with_overflow(exact[n], rounded[n]) if n in rounded else exact[n]
        right = tuple(
            b.to(a.dtype) if _casts(a, b) else b for a, b in zip(ours[n], right, strict=False)
        )
        for name, rows in zip(errors, errors_of_rows([ours[n]], [right], False), strict=False):
            errors[name] = max(errors[name], float(rows.max()) if len(rows) else 0.0)
        decides = checking.kernels if traced else None
        _check_case(checking, n, ours[n], right, limits, list(errors), with_pieces, unit, decides)
    for n, words in wrong_choices(by_case, low, unit):
        assert checking.kernels is not None
        _decide(checking, checking.kernels, n, words)
    return errors, max(limits, default=0.0)


def _check_case(
    checking: _Checking,
    number: int,
    ours: Results,
    right: Results,
    limits: Sequence[float],
    names: Sequence[str],
    with_pieces: Callable[[Results, int], Results],
    unit: float,
    kernels: Kernels | None,
) -> None:
    """Raises VerificationError where the code is wrong in one of the cases."""
    beyond, case = rows_beyond([ours], [right], limits, False), checking.cases[number]
    if beyond is None:
        return
    words = f"{names[beyond.number or 0]} {beyond} (inputs {shapes(case)})"
    if kernels is not None and not any(e.isinf().any() for e in beyond.errors):
        _decide(checking, kernels, number, words)
        return
    if checking.together is not one_by_one:
        raise VerificationError(_AGAIN)
    noise = unit * NOISE or FLOAT32_NOISE
    samples = _SAMPLES if checking.tolerance is None else 0
    others = other_results(checking.source, [case], noise, samples)
    while beyond is not None and (sample := next(others, None)) is not None:
        other = [with_pieces(sample[0], number)]
        if not (samples and unit):  # rounding moves no choice far but to another right one
            beyond = beyond.agreeing_with([ours], other)
        else:
            beyond = beyond.explained_by(other)
    if beyond is not None:
        raise VerificationError(
            f"{words}; the graph is correct after every pass: the generated code is wrong"
        )


def _decide(checking: _Checking, kernels: Kernels, number: int, words: str) -> None:
    """Raises VerificationError where a kernel is wrong in a case whose results are odd, as told."""
    kernels.decide(checking.cases[number])
    checking.notes.append(f"{words}: each kernel was compared there, and is right")


def _limits(
    checking: _Checking, unit: float, rounded: Mapping[int, Results], exact: Sequence[Results]
) -> list[float]:
    """The greatest error of each output, and of the pieces of a text."""
    count = max(map(len, exact), default=0)
    if checking.tolerance is not None:
        return [checking.tolerance] * count
    least = max(TOLERANCES["f32"], rounded_rows(checking.final.graph), unit)
    errors = errors_of_rows(list(rounded.values()), [exact[n] for n in rounded], False)
    return [max(least, usual(each)) for each in errors] or [least] * count


def _joined(fed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(list(fed))] if fed else []


def _casts(actual: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a result in float32 is one in 16 bits, or in float64."""
    return actual.is_floating_point() and right.is_floating_point()


def _with_overflow(exact: Results, rounded: Results) -> Results:
    """The results in float32, with those infinities and NaNs that the graph in 16 bits has."""
    return tuple(
        torch.where(b.isfinite() & ~a.isnan(), a, b.to(a.dtype)) if _casts(a, b) else a
        for a, b in zip(exact, rounded, strict=True)
    )


def _is_written(
    graph: Graph, output: Value, result: torch.Tensor, written: Named, tolerance: float | None
) -> bool:
    """Whether an output is what a kernel wrote; False where kernels wrote other parts of it. Raises
    VerificationError where it differs, or has another dtype than the graph."""
    value, dtype = output, TORCH_DTYPES[output.dtype]
    while value.name not in written:
        op = graph.producers.get(value)
        if op is None or op.name not in _SAME:
            break
        value = op.inputs[0]
    if result.dtype != dtype:
        raise VerificationError(f"{output.name} is {result.dtype}, and the graph's {dtype}")
    if value.name not in written or value.dtype != output.dtype:
        return False
    result = real_parts(result)  # kernels write complex numbers as pairs
    kernel = written[value.name].reshape(result.shape).to(result.dtype)
    if not distance(result, kernel) <= (tolerance or 0.0):
        raise VerificationError(
            f"{output.name} differs from what its kernel wrote: the graph is correct after every "
            "pass: the generated code is wrong"
        )
    return True


_SAME = tuple(f"aten.{name}" for name in ("alias.default", "reshape.default", "unsqueeze.default"))
"""Ops whose results have the elements of their operand, in order."""


def say(detail: str) -> None:
    """What is compared now, for those who wait."""
    LOGGER.debug("verify: %s", detail, extra={"detail": detail})


def _nan_of_eager(program: Program, answers: Sequence[Reference]) -> str:
    """A sentence where eager itself returns NaN, which code may have elsewhere; otherwise "".

    It names the first weight that holds NaN or infinity.
    """
    for case, expected in answers:
        if not any(tensor.isnan().any() for tensor in expected):
            continue
        weights = [
            name
            for name, tensor in program.weights.items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
        cause = f": its weight {weights[0]} holds NaN or infinity" if weights else ""
        return f"the model itself gives NaN (inputs {shapes(case)}){cause}"
    return ""
