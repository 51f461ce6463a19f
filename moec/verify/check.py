"""A compiled model against the module it came from, on random inputs of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moec.capture import Captured
from moec.errors import CaptureError, IRError, VerificationError
from moec.interpret.evaluate import evaluate
from moec.interpret.random_inputs import random_like
from moec.interpret.resized import resized
from moec.interpret.run_in_float32 import MEANING, InFloat32, in_float32, wide
from moec.interpret.tolerance import (
    FAR,
    QUANTISED_STRAYS,
    STRAYS,
    allowed_strays,
    computed_dtypes,
    default_tolerance,
    distance,
    rounds_rows,
    row_errors,
)
from moec.ir.dims import Bounds
from moec.ir.graph import Graph, Program
from moec.passes.core.runner import Step
from moec.report.data import MovedLine
from moec.report.quantisation import moved_lines, unquantised_steps
from moec.verify.stable_topk import FirstOfEquals
from moec.verify.turns import turns

Case = tuple[torch.Tensor, ...]
Answer = tuple[Case, tuple[torch.Tensor, ...]]
Pieces = tuple[str, Callable[[torch.Tensor], Iterable[tuple[int, torch.Tensor]]]]
"""The output that holds the logits, and a function that feeds token ids [B, S] in pieces: it
gives the end of each piece and the logits [B, V] after it."""
Exact = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
Run = Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Checked:
    """The greatest error of each output over all cases, what was allowed, and how many of the
    rows were farther off (allowed in 16 bits alone, see `moec.interpret.tolerance.STRAYS`).
    `ties` are rows that are right and not eager's: equal values were chosen among (see
    `moec.verify.stable_topk`). `skipped` says which sizes the module itself does not run at.
    `moved` says how far quantisation took the outputs from what they were: `errors` are then those
    against the quantised graph."""

    errors: Mapping[str, float]
    tolerance: float
    strays: int = 0
    rows: int = 0
    ties: int = 0
    skipped: tuple[str, ...] = ()
    moved: tuple[MovedLine, ...] = ()


@dataclass(frozen=True)
class Compared:
    """A result, and those that would be right: eager's first. It is output number `output`, or
    its token before `stop`."""

    got: torch.Tensor
    right: tuple[torch.Tensor, ...]
    output: int
    stop: int | None = None

    def of(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        output = results[self.output]
        return output if self.stop is None else output[:, self.stop - 1]


def cases(captured: Captured) -> list[Case]:
    """The example, random inputs of its sizes, of the least and of odd sizes, and of those on both
    sides of where a size expression, a mask or a guard turns."""
    program, generator = captured.program, torch.Generator().manual_seed(0)
    count = len(captured.example)
    inputs = [captured.example]
    few = (_sizes(captured, lambda b: max(b.low, 1)), _sizes(captured, _odd))
    for size in ({}, *few, *turns(captured.program.graph, captured.example)):
        example = [
            resized(t, v.shape, size)
            for t, v in zip(captured.example, program.graph.inputs, strict=False)
        ]
        inputs.append(tuple(random_like(program, example, generator)[:count]))
    return inputs


def _odd(bounds: Bounds) -> int:
    """Neither the example's size nor a multiple of any tile, within the bounds."""
    high = bounds.high if bounds.high is not None else 19
    return max(bounds.low, min(high, 19 if bounds.low <= 19 else bounds.low))


def _sizes(captured: Captured, choose: Callable[[Bounds], int]) -> dict[str, int]:
    """A size for each name; only the last name of an input is odd, so that cases stay small."""
    graph = captured.program.graph
    return {
        name: choose(bounds) if name != "B" else min(choose(bounds), 3)
        for name, bounds in graph.bounds.items()
    }


def check(
    captured: Captured,
    run: Run,
    steps: Sequence[Step],
    tolerance: float | None = None,
    pieces: Pieces | None = None,
) -> Checked:
    """Compare `run` with eager on every case, and `pieces` where a model continues text.

    Where passes changed the model on purpose, the graph before the first of them is compared
    with eager, and `run` with the graph after the last. Raises as `_check` does.
    """
    changes = [i for i, step in enumerate(steps) if step.changed]
    if not changes:
        return _check(captured, run, steps, tolerance, pieces)
    before = steps[: changes[0]]
    _check(captured, _in_eager(before[-1].program), before, tolerance, None)
    meant = steps[changes[-1]].program

    def eager(*case: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = evaluate(meant.graph, _with_states(meant, case), meant.weights)
        return results[: len(meant.graph.outputs)]

    changed = replace(captured, program=meant, eager=eager, is_graph=True)
    checked = _check(changed, run, steps[changes[-1] :], tolerance, pieces)
    exact = unquantised_steps(steps)
    if len(exact) == len(steps):
        return checked
    answers, _ = _answers(changed)
    original = _in_eager(exact[-1].program)
    inputs = [value.name for value in captured.program.graph.inputs][: len(captured.example)]
    names = [value.name for value in meant.graph.outputs]
    originals = [original(dict(zip(inputs, case, strict=True))) for case, _ in answers]
    return replace(
        checked,
        moved=moved_lines(
            names, [[f[n] for n in names] for f in originals], [e for _, e in answers]
        ),
    )


def _in_eager(program: Program) -> Run:
    """The program run op by op, by name as an executor is."""
    names = [value.name for value in program.graph.inputs]
    states = {state.before.name for state in program.graph.states}

    def run(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        case = [inputs[name] for name in names if name not in states]
        results = evaluate(program.graph, _with_states(program, case), program.weights)
        return {v.name: t for v, t in zip(program.graph.outputs, results, strict=False)}

    return run


def _check(
    captured: Captured,
    run: Run,
    steps: Sequence[Step],
    tolerance: float | None,
    pieces: Pieces | None,
) -> Checked:
    """Compare `run` with eager on every case, and where a model continues text also `pieces`.

    Raises VerificationError, naming the first pass that changed the numbers, where an output
    is farther off than `tolerance`.
    """
    graph = captured.program.graph
    rule = _Rule.of(graph, tolerance)
    names = [value.name for value in graph.outputs]
    inputs = [value.name for value in graph.inputs][: len(captured.example)]
    worst: dict[str, float] = {}
    farthest: tuple[float, str, Case] = (-1.0, "", ())
    compared: list[Compared] = []
    owners: list[int] = []  # which case each is of
    answers, skipped = _answers(captured)
    for number, (case, expected) in enumerate(answers):
        got = run(dict(zip(inputs, case, strict=True)))
        comparisons = [Compared(got[name], (), i) for i, name in enumerate(names)]
        if pieces is not None:
            name, fed = pieces
            comparisons += [
                Compared(logits, (), names.index(name), stop) for stop, logits in fed(case[0])
            ]
        for item in comparisons:
            name = _name(names, item)
            right = item.of(expected)
            error = distance(item.got, right)
            worst[name] = max(worst.get(name, 0.0), error)
            farthest = max(farthest, (error, name, case), key=lambda entry: entry[0])
            compared.append(replace(item, right=(right,)))
            owners.append(number)
    try:
        right_by = _right(rule, captured, answers, compared, owners)
    except (IRError, RuntimeError):  # the captured graph does not run: the blame says so
        right_by = None
    if right_by is None:
        error, name, case = farthest
        _check_no_nan(captured.program, answers)
        raise VerificationError(
            f"{name} differs from eager by {error:.1e} of its greatest value, allowed are "
            f"{rule.limit:.0e} (inputs {_shapes(case)}); {_blame(rule, answers, steps)}"
        )
    strays, rows = rule.strays(right_by)
    ties = rule.strays(compared)[0] - strays
    if ties:
        worst = dict.fromkeys(worst, 0.0)
        for item in right_by:
            name = _name(names, item)
            worst[name] = max(worst[name], *_nearest(item).tolist(), 0.0)
    return Checked(worst, rule.limit, strays, rows, ties, skipped)


def _check_no_nan(program: Program, answers: Sequence[Answer]) -> None:
    """Raises VerificationError where eager itself gives NaN: code may give it elsewhere."""
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
        raise VerificationError(
            f"the model itself gives NaN (inputs {_shapes(case)}){cause}, so that there is nothing "
            "to compare with: mend the model, or compile it with verify=False (--verify off)"
        )


def _name(names: Sequence[str], item: Compared) -> str:
    return names[item.output] + (" in pieces" if item.stop is not None else "")


def _right(
    rule: _Rule,
    captured: Captured,
    answers: Sequence[Answer],
    compared: Sequence[Compared],
    owners: Sequence[int],
) -> Sequence[Compared] | None:
    """The results beside what they are right by: eager, or eager that chooses the first of equal
    values. None if they are not. The captured graph is never asked: it may be wrong itself."""

    def beside(items: Sequence[Compared], exact: Exact) -> list[Compared]:
        results = [exact(case) for case, _ in answers]
        return [
            replace(item, right=(*item.right, item.of(results[owner]).to(item.right[0].dtype)))
            for item, owner in zip(items, owners, strict=True)
        ]

    if rule.allows(compared):
        return compared
    # In 16 bits a token that eager sends to the same experts in either precision is right, however
    # near its scores are to a tie.
    widened = _widened(captured) if rule.share else None
    if widened is not None and rule.allows(beside(compared, widened)):
        return compared
    tied = FirstOfEquals()
    right = beside(compared, _under(tied, _eager(captured)))
    if not tied.met:
        return None
    if rule.allows(right):
        return right
    if widened is None:
        return None
    both = beside(beside(right, widened), _under(FirstOfEquals(), widened))
    return right if rule.allows(both) else None


def _eager(captured: Captured) -> Exact:
    return lambda case: captured.eager(*case)


def _widened(captured: Captured) -> Exact:
    """The source in float32. Where a graph is the source, its own types say what is widened."""
    if captured.is_graph:
        run = in_float32(captured.program)
        return lambda case: run(_with_states(captured.program, case))
    mode = InFloat32()  # type: ignore[no-untyped-call]
    return _under(mode, lambda case: captured.eager(*map(wide, case)))


def _under(mode: TorchDispatchMode, exact: Exact) -> Exact:
    def run(case: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with mode:
            return exact(case)

    return run


def _answers(captured: Captured) -> tuple[list[Answer], tuple[str, ...]]:
    """What eager gives in each case, and in words the cases in which it fails."""
    answers: list[Answer] = []
    skipped: list[str] = []
    for case in cases(captured):
        try:
            answers.append((case, captured.eager(*case)))
        except Exception as error:
            if case is captured.example:
                raise CaptureError(f"the model fails on its example inputs: {error}") from error
            skipped.append(f"inputs {_shapes(case)} were not compared: the model fails: {error}")
    return answers, tuple(dict.fromkeys(skipped))


@dataclass(frozen=True)
class _Rule:
    """No error above `greatest`, and above `limit` no more than a `share` of the rows."""

    limit: float
    greatest: float
    share: float

    @staticmethod
    def of(graph: Graph, tolerance: float | None) -> _Rule:
        limit = default_tolerance(graph) if tolerance is None else tolerance
        share = max((STRAYS.get(dtype, 0.0) for dtype in computed_dtypes(graph)), default=0.0)
        share = max(share, QUANTISED_STRAYS if rounds_rows(graph) else 0.0)
        return _Rule(limit, max(limit, FAR) if share else limit, share)

    def strays(self, compared: Iterable[Compared]) -> tuple[int, int]:
        """How many rows are farther than the limit from every result that would be right."""
        errors = list(map(_nearest, compared))
        return sum(int((e > self.limit).sum()) for e in errors), sum(map(len, errors))

    def allows(self, compared: Sequence[Compared]) -> bool:
        for item in compared:
            if distance(item.got, item.right[0]) == float("inf"):
                return False
            nearest = _nearest(item)
            if len(nearest) and not nearest.max() <= self.greatest:
                return False
        if not self.share:
            return True
        # Pieces of a text are few beside whole ones, and would hide among them.
        groups: dict[tuple[int, bool], list[Compared]] = {}
        for item in compared:
            groups.setdefault((item.output, item.stop is not None), []).append(item)
        counts = map(self.strays, groups.values())
        return all(strays <= allowed_strays(self.share, rows) for strays, rows in counts)


def _nearest(item: Compared) -> torch.Tensor:
    return torch.stack([row_errors(item.got, value) for value in item.right]).amin(0)


def _shapes(case: Case) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in case)


def _blame(rule: _Rule, answers: Sequence[Answer], steps: Sequence[Step]) -> str:
    """Which pass first made a graph that differs, or that it was none of them.

    The captured graph is compared with eager. Those after it are compared with the captured
    one, all of them in float32: a pass may move a rounding, and is not to blame for it."""
    if not steps:
        return "the generated code is wrong"
    limit = min(rule.limit, MEANING) if not rule.share else MEANING
    try:
        start = steps[0].program
        compared = [
            Compared(got, (value,), 0)
            for case, expected in answers
            for got, value in _pairs(
                evaluate(start.graph, _with_states(start, case), start.weights), expected
            )
        ]
        if not rule.allows(compared):
            return f"the first pass after which the graph differs is {steps[0].name}"
        inputs = [_with_states(start, case) for case, _ in answers]
        references = list(map(in_float32(start), inputs))
    except (IRError, RuntimeError) as error:
        return f"the graph after {steps[0].name} does not run: {error}"
    for step in steps[1:]:
        try:
            outputs = map(in_float32(step.program), inputs)
            if any(
                not distance(got, value) <= limit
                for results, right in zip(outputs, references, strict=True)
                for got, value in _pairs(results, right)
            ):
                return f"the first pass after which the graph differs is {step.name}"
        except (IRError, RuntimeError) as error:
            return f"the graph after {step.name} does not run: {error}"
    return "the graph is right after every pass: the generated code is wrong"


def _pairs(
    results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The outputs side by side; the states' new contents, which follow them, are not compared."""
    return zip(results, expected, strict=False)


def _with_states(program: Program, case: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [*case, *(program.weights[state.before.name] for state in program.graph.states)]
