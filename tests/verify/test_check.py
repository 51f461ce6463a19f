"""Verification finds errors, and names the part that caused them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moec
from moec.capture import capture
from moec.errors import CaptureError, VerificationError
from moec.ir.graph import Program
from moec.oracle.tolerance import distance
from moec.passes.core.runner import Log
from moec.passes.lower.fuse_gate import FuseGate
from moec.runtime.call.executor import Executor
from moec.verify import cases
from moec.verify import references as judging
from moec.verify.cases import references
from moec.verify.check import check
from tests.capture.modules import WIDTH, Function, Moe

x = torch.randn(5, WIDTH)


def break_gates(monkeypatch: pytest.MonkeyPatch, which: slice) -> None:
    """fuse-gate makes the weights of some gates a fifth greater than they are."""
    right = FuseGate.run

    def wrong(self: FuseGate, program: Program, log: Log) -> Program:
        result = right(self, program, log)
        graph = result.graph
        broken = [op for op in graph.ops if op.name == "moe.gate"][which]
        assert broken
        ops = tuple(
            replace(op, attrs={**op.attrs, "scale": 1.2}) if op in broken else op
            for op in graph.ops
        )
        return replace(result, graph=replace(graph, ops=ops))

    monkeypatch.setattr(FuseGate, "run", wrong)


@pytest.fixture
def broken_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    break_gates(monkeypatch, slice(None))


@pytest.fixture
def broken_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled code is off by a thousandth of a result."""
    right = Executor.__call__

    def wrong(self: Executor, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value * 1.001 for name, value in right(self, inputs).items()}

    monkeypatch.setattr(Executor, "__call__", wrong)


@pytest.mark.usefixtures("broken_gate")
@pytest.mark.parametrize("verify", [True, "full", "quick"])
def test_a_wrong_pass_is_named(verify: Any) -> None:
    with pytest.raises(VerificationError) as raised:
        moec.compile(Moe(), (x,), verify=verify)
    words = str(raised.value)
    assert words.startswith("output of the graph in float32 differs from eager by ")
    assert words.endswith("the first pass after which the graph differs is fuse-gate")


@pytest.mark.usefixtures("broken_code")
def test_wrong_code_is_named() -> None:
    with pytest.raises(VerificationError, match="after every pass: the generated code is wrong"):
        moec.compile(Moe(), (x,))


@pytest.mark.usefixtures("broken_code")
def test_verify_sets_the_limit_or_is_off() -> None:
    loose = moec.compile(Moe(), (x,), verify=1e-2)
    assert loose.checked is not None
    assert loose.checked.tolerance == 1e-2
    assert 9e-4 < loose.checked.errors["output"] < 2e-3
    assert moec.compile(Moe(), (x,), verify=False).checked is None
    quick = moec.compile(Moe(), (x,), verify="quick").report()
    assert (quick.verified, quick.checked_kernels.splitlines()) == (
        "quick",
        ["graph: right in float32 with 6 inputs, each row to 1e-04", "weights: 3 bit for bit"],
    )


def test_zero_allows_nothing() -> None:
    with pytest.raises(VerificationError, match="at most 0e"):
        moec.compile(Moe(), (x,), verify=0.0)
    exact = moec.compile(Function(lambda x: x * 2), (x,), verify=0)
    assert exact.checked is not None
    assert exact.checked.errors == {"output": 0.0}


COMPLEX = {
    "pairs": lambda x: torch.view_as_complex(x.unflatten(1, (-1, 2))),
    "polar": lambda x: torch.polar(x.abs(), x),
    "cast": lambda x: x.to(torch.cfloat),
    "transform": torch.fft.rfft,
    "scalar": lambda x: (x, torch.complex(x.sum(), x.mean())),
    "input": lambda x: x.to(torch.cfloat) * 2,
}


def of_complex(name: str) -> moec.CompiledModel:
    return moec.compile(Function(COMPLEX[name]), (x.to(torch.cfloat) if name == "input" else x,))


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_are_compared_as_pairs(name: str) -> None:
    assert of_complex(name).checked is not None


@pytest.mark.usefixtures("broken_code")
@pytest.mark.parametrize("name", COMPLEX)
def test_wrong_complex_numbers_are_found(name: str) -> None:
    with pytest.raises(VerificationError, match="the generated code is wrong"):
        of_complex(name)


def off(rows: slice) -> Any:
    """A run of Moe in bf16 in which some rows are farther off than rounding, and not by much."""
    captured = capture(Moe(torch.bfloat16), (torch.randn(40, WIDTH).bfloat16(),))

    def run(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        (result,) = captured.eager(inputs["x"])
        if len(result):
            result[rows] += 0.2 * result.abs().max()
        return {"output": result}

    return captured, run


@pytest.mark.parametrize("rows", [slice(30, 31), slice(0, 9)])
def test_in_16_bits_no_row_is_excused(rows: slice) -> None:
    with pytest.raises(VerificationError, match="the generated code is wrong"):
        check(*off(rows), ())


@pytest.mark.usefixtures("broken_gate")
@pytest.mark.parametrize("seed", [0, 22, 27])  # with the last two, eager and passes break ties
def test_a_wrong_pass_is_named_in_16_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, WIDTH, generator=generator).bfloat16()
    with pytest.raises(VerificationError, match="the graph differs is fuse-gate"):
        moec.compile(Moe(torch.bfloat16), (x,))


@pytest.mark.parametrize("seed", [22, 27, 47, 55])
def test_in_16_bits_a_tie_that_is_broken_as_in_float32_is_right(seed: int) -> None:
    """A row of thirty, of eager or of the code, by half of the greatest value."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, WIDTH, generator=generator).bfloat16()
    checked = moec.compile(Moe(torch.bfloat16), (x,)).checked
    assert checked is not None
    assert checked.errors["output"] <= checked.tolerance < 5e-2


def test_cases_have_the_sizes_that_belong_together() -> None:
    """Two inputs of T and 2*T rows change size together, within the bounds."""
    rows = torch.export.Dim("rows", min=2, max=11)
    model = Function(lambda x, y: torch.cat([x, x]) + y)
    captured = capture(
        model, (x, torch.randn(10, WIDTH)), dynamic_shapes=({0: rows}, {0: 2 * rows})
    )
    answers, _ = references(captured)
    sizes = [(a.shape[0], b.shape[0]) for (a, b), _ in answers]
    assert sizes[:4] == [(5, 10), (5, 10), (2, 4), (11, 22)]


class Positions(nn.Module):
    """Runs up to sixteen rows, which no export can know."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(torch.arange(x.shape[0]))


def test_sizes_that_the_module_refuses_are_left_out_and_said() -> None:
    compiled = moec.compile(Positions(), (x,))
    assert compiled.checked is not None
    (report,) = compiled.checked.notes
    assert report.startswith("inputs (19, 8) were not compared: the model fails: ")
    assert report in compiled.report().notes


def test_sizes_whose_results_take_too_much_memory_are_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four times the example's numbers are compared in any case: 5 rows, 1 row, and not 19."""
    monkeypatch.setattr(cases, "MOST_RESULTS", 1)
    captured = capture(Function(lambda x: x.repeat(1, 10)), (torch.randn(5, 8),))
    answers, skipped = references(captured)
    assert {len(case[0]) for case, _ in answers} == {0, 1, 5}
    (name,) = captured.program.graph.bounds
    assert skipped == (f"sizes {name} = 19 were not compared: that takes 12.2 kB of memory",)


def test_a_module_that_fails_on_its_example() -> None:
    model = Positions()
    captured = capture(model, (x,))
    model.table = nn.Embedding(2, WIDTH)
    with pytest.raises(CaptureError, match="the model fails on its example inputs: "):
        check(captured, lambda inputs: {}, ())


numbers = st.lists(
    st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=6
).map(torch.tensor)


@given(numbers)
def test_nothing_is_apart_from_itself(values: torch.Tensor) -> None:
    assert distance(values, values.clone()) == 0.0


@given(numbers, st.integers(0, 5), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_what_is_not_finite_must_be_the_same(
    values: torch.Tensor, position: int, odd: float
) -> None:
    changed = values.clone()
    changed[position % len(values)] = odd
    same = bool(((changed == values) | (changed.isnan() & values.isnan())).all())
    expected = 0.0 if same else float("inf")  # never NaN, which max(0.1, nan) would lose
    assert distance(changed, values) == distance(values, changed) == expected


@pytest.mark.parametrize("other", [torch.ones(2, 2), torch.ones(2, dtype=torch.float64)])
def test_shapes_and_dtypes_must_be_the_same(other: torch.Tensor) -> None:
    assert distance(other, torch.ones(2)) == float("inf")


class Sparse(nn.Module):
    """Keeps the four greatest of scores that are mostly equal: what torch keeps is its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.relu(x - 1.5)
        mask = torch.zeros_like(x).scatter(1, scores.topk(4).indices, 1.0)
        return x * mask


def test_of_equal_values_the_first_are_chosen() -> None:
    model, x = Sparse(), torch.randn(40, 90)
    compiled = moec.compile(model, (x,))
    checked = compiled.checked
    assert checked is not None
    assert any("each kernel was compared there, and is right" in note for note in checked.notes)
    first = torch.relu(x - 1.5).sort(descending=True, stable=True).indices[:, :4]
    assert torch.equal(compiled(x) != 0, torch.zeros_like(x).scatter(1, first, 1.0) != 0)


@pytest.mark.usefixtures("broken_code")
def test_equal_values_excuse_nothing_else() -> None:
    with pytest.raises(VerificationError, match="the generated code is wrong"):
        moec.compile(Sparse(), (torch.randn(40, 90),))


def test_a_captured_graph_that_does_not_run_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **options: object) -> None:
        raise RuntimeError("cannot reshape tensor of 0 elements")

    captured = capture(Sparse(), (torch.randn(4, 9),))
    monkeypatch.setattr(judging, "meaning", fails)
    steps = moec.compile(Sparse(), (torch.randn(4, 9),), build=False).pass_results
    words = judging.bad_pass(1e-4, captured, references(captured)[0], steps)
    assert "does not run: cannot reshape tensor of 0" in words


def test_a_model_that_gives_nan_itself_is_named_first() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Softmax(-1))
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    captured = capture(model, (torch.randn(3, 4),))

    def run(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        (output,) = captured.program.graph.outputs
        return {output.name: torch.zeros(len(inputs["input"]), 4)}

    with pytest.raises(VerificationError, match=r"gives NaN .*: its weight 0\.weight holds NaN"):
        check(captured, run, [])


def test_nan_at_no_rows_is_a_note_and_never_the_verdict() -> None:
    """A mean over no row is NaN in eager too: the numbers of other sizes are what is wrong."""
    captured = capture(Function(lambda x: (x * 2, x.mean())), (torch.randn(3, 4),))
    names = [value.name for value in captured.program.graph.outputs]

    def run(factor: float, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (x,) = inputs.values()
        return dict(zip(names, (x * factor, x.mean()), strict=True))

    checked = check(captured, partial(run, 2.0), ())
    assert any("the model itself gives NaN" in note for note in checked.notes)
    with pytest.raises(VerificationError, match="differs from eager by") as refused:
        check(captured, partial(run, 2.5), ())
    assert "NaN" not in str(refused.value)


def test_a_model_that_gives_nan_in_the_same_entries_has_a_note() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = float("nan")
    report = str(moec.compile(model, (torch.randn(3, 4),)).report())
    assert "note: the model itself gives NaN" in report
    assert "its weight 0.weight holds NaN or infinity" in report


def sums_in_two_orders(x: torch.Tensor) -> torch.Tensor:
    """Which of equal sums is the greatest: their last bits decide."""
    w = torch.linspace(1, 2, 40, dtype=x.dtype)[:, None]
    return torch.cat([x @ w, x.flip(-1) @ w.flip(0)], -1).argmax(-1)


def test_a_choice_among_sums_that_are_equal_but_for_rounding_is_right() -> None:
    captured = capture(Function(sums_in_two_orders), (torch.randn(3, 40),))
    wrong = 0

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal wrong
        (x,) = inputs.values()
        (name,) = (value.name for value in captured.program.graph.outputs)
        choices = sums_in_two_orders(x.double())
        wrong += int((choices != sums_in_two_orders(x)).sum())
        return {name: choices}

    check(captured, run, ())
    assert wrong > 0


@pytest.mark.parametrize("gap", [1e-3, 1.0])
def test_another_choice_than_the_greatest_is_wrong(gap: float) -> None:
    def greatest(x: torch.Tensor) -> torch.Tensor:
        score = x.cumsum(-1)[..., -1]
        return torch.stack([score, score - gap * x.abs().sum(-1)], -1).argmax(-1)

    captured = capture(Function(greatest), (torch.randn(3, 40),))
    (name,) = (value.name for value in captured.program.graph.outputs)
    with pytest.raises(VerificationError, match="output differs from eager"):
        check(captured, lambda inputs: {name: 1 - greatest(*inputs.values())}, ())
