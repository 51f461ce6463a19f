"""Codes chosen on calibration data: smaller errors than rounding to nearest, and their report."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import moec
from moec.errors import UsageError
from moec.ir.formats.integer import Quantised, dequantise, encode, quantise
from moec.ir.formats.notation import Format, parse
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.passes.calibration.data import Calibration
from moec.passes.core.damage import FEWEST
from moec.passes.quantise.gptq_codes import calibrate, rows_of
from moec.report.report import Report
from tests.capture.modules import WIDTH, Moe
from tests.passes.quantise.test_quantise_experts import GRAPH, program

E, N, K = 3, 24, 64


def rows(*counts: int) -> list[torch.Tensor]:
    """Inputs whose features are correlated: else nothing can be made up for."""
    mixed = torch.randn(K, K) / 8
    return [torch.randn(count, K) @ mixed + torch.randn(count, K) / 4 for count in counts]


@pytest.mark.parametrize(
    "text", ["int4", "int4:32:asymmetric", "int8", "int3:32", "int2:64", "mxfp4"]
)
def test_products_are_nearer_than_with_the_nearest_codes(text: str) -> None:
    format, weight, state = parse(text), torch.randn(E, N, K), rows(200, 300, 400)
    ((codes, fit),) = calibrate(format, {"w": weight}, state)
    nearest = quantise(format, weight)
    assert torch.equal(codes.scales, nearest.scales)
    assert fit.rows_per_expert == (200, 300, 400)
    assert fit.undersampled == ()

    def error(result: Any) -> float:
        values = dequantise(format.kind, result.codes, result.scales, result.zeros)
        pairs = zip(state, weight, values, strict=True)
        off = sum(float((x @ (a - b).mT).norm()) ** 2 for x, a, b in pairs)
        total = sum(float((x @ a.mT).norm()) ** 2 for x, a in zip(state, weight, strict=True))
        return (off / total) ** 0.5

    assert fit.nearest_error == pytest.approx(error(nearest), rel=1e-3)
    assert fit.gptq_error == pytest.approx(error(codes), rel=1e-3)
    assert fit.gptq_error < 0.9 * fit.nearest_error


def plain(format: Format, weight: torch.Tensor, x: torch.Tensor, base: Quantised) -> torch.Tensor:
    """Weights [N, K] by the recursion of arXiv 2210.17323, equations 2 and 3, in float64: of the
    inverse Hessian the column that was rounded is eliminated."""
    left, h = weight.double(), x.double().T @ x.double()
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h)))
    values = torch.empty(weight.shape)
    for k in range(weight.shape[1]):
        scales, zeros = (
            None if t is None else t[:, k * t.shape[1] // len(h)][:, None]
            for t in (base.scales, base.zeros)
        )
        code = encode(format, left[:, k : k + 1].float(), scales, zeros)
        values[:, k] = dequantise(format.kind, code, scales, zeros)[:, 0]
        lost = left[:, k] - values[:, k]
        left = left - lost[:, None] * inverse[k] / inverse[k, k]
        inverse = inverse - inverse[:, k : k + 1] * inverse[k] / inverse[k, k]
    return values


@pytest.mark.parametrize(
    "text",
    ["int8", "int4", "int4:32", "int4:32:asymmetric", "int3:64", "int2:64", "fp8", "mxfp4"],
)
def test_codes_are_those_of_the_plain_recursion(text: str) -> None:
    """Of experts with many rows, with features that are always zero, with fewer rows than features
    and with too few; but for numbers that float32 rounds to another side."""
    torch.manual_seed(0)
    format, width = parse(text), 2 * K
    weight, mixed = torch.randn(4, N, width), torch.randn(width, width) / 11
    state = [torch.randn(count, width) @ mixed for count in (300, 200, FEWEST, FEWEST - 1)]
    state[1][:, :2] = state[1][:, 30:70] = 0
    ((codes, _),) = calibrate(format, {"w": weight}, state)
    base = quantise(format, weight)
    solved, nearest = (dequantise(format.kind, *vars(q).values()) for q in (codes, base))
    for e in range(3):
        parts = (None if t is None else t[e] for t in vars(base).values())
        expected = plain(format, weight[e], state[e], Quantised(*parts))
        assert (solved[e] != expected).double().mean() < 1e-3
        assert (solved[e] != nearest[e]).double().mean() > 0.01
    assert torch.equal(solved[3], nearest[3])


def test_an_expert_that_saw_too_few_rows_is_rounded_to_nearest() -> None:
    format, weight = parse("int4"), torch.randn(E, N, K)
    ((codes, fit),) = calibrate(format, {"w": weight}, rows(0, FEWEST - 1, FEWEST))
    nearest = quantise(format, weight)
    assert fit.undersampled == (0, 1)
    assert torch.equal(codes.codes[:2], nearest.codes[:2])
    assert not torch.equal(codes.codes[2], nearest.codes[2])


def test_experts_are_solved_alike_in_any_number_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    format, weight, state = parse("int4:32"), torch.randn(E, N, K), rows(90, 80, 70)
    ((codes, _),) = calibrate(format, {"w": weight}, state)
    monkeypatch.setattr("moec.passes.quantise.gptq_codes.HELD", 1)
    ((again, _),) = calibrate(format, {"w": weight}, state)
    assert torch.equal(codes.codes, again.codes)


def test_codes_of_parameters_hold_no_float_weights() -> None:
    """Weights may have gradients: a graph of these would hold each layer in float32."""
    weight = torch.randn(E, N, K).requires_grad_()
    ((codes, fit),) = calibrate(parse("int4:32"), {"w": weight}, rows(90, 80, 70))
    assert not codes.scales.requires_grad
    assert fit.gptq_error < fit.nearest_error


def test_matrices_of_the_same_rows_are_solved_as_each_alone() -> None:
    format, state = parse("int4:32"), rows(90, 80, 70)
    weights = {"gate": torch.randn(E, N, K), "up": torch.randn(E, N + 8, K)}
    both = calibrate(format, weights, state)
    for (name, weight), (codes, fit) in zip(weights.items(), both, strict=True):
        ((alone, fit_alone),) = calibrate(format, {name: weight}, state)
        assert torch.equal(codes.codes, alone.codes)
        assert fit == fit_alone


def test_rows_are_those_that_each_expert_reads() -> None:
    """Of both cases, in order; of experts by ends and order, of a linear layer all."""
    of = program(GRAPH)
    x = torch.randn(3, 64)
    order, ends = torch.tensor([4, 0, 3, 1, 2, 5]), torch.tensor([2, 5])
    case = (x, order.int(), ends.int(), torch.rand(3, 2))
    gate, down, head = of.graph.ops
    data = Calibration((case, case), 6)
    pairs = list(rows_of(of, data, [head, down, gate]))
    assert [op for op, _ in pairs] == [gate, down, head]
    matches = [rows for _, rows in pairs]
    ((_, alone),) = rows_of(of, data, [down])
    assert all(torch.equal(a, b) for a, b in zip(alone, matches[1], strict=True))
    assert list(rows_of(of, data, [])) == []
    assert torch.equal(matches[0][0], x[[2, 0, 2, 0]])
    assert torch.equal(matches[0][1], x[[1, 0, 1, 1, 0, 1]])
    graph = of.graph
    hidden = Program(type(graph)(graph.inputs, graph.params, graph.ops, gate.outputs), of.weights)
    (h,) = evaluate(hidden.graph, list(case), of.weights)
    assert torch.equal(matches[1][1], h[2:5].repeat(2, 1))
    assert [len(entry) for entry in matches[2]] == [12]


def test_rows_of_a_chain_are_computed_once() -> None:
    """No op runs again: what it read is gone."""
    names = "abcd"
    lines = (f"{y}: f32[T, 8] = aten.linear.default({x}, w)" for x, y in pairwise("x" + names))
    text = "graph main(x: f32[T, 8]; w: f32[8, 8]) {\n  size T in [0, inf]\n  "
    of = program(text + "\n  ".join(lines) + "\n  return d\n}")
    x = torch.randn(5, 8)
    pairs = list(rows_of(of, Calibration(((x,), (-x,)), 10), of.graph.ops))
    for op, (actual,) in pairs:
        assert torch.equal(actual, torch.cat([x, -x])), op
        x = torch.nn.functional.linear(x, of.weights["w"])
    assert len(pairs) == len(names)


def test_from_compile_to_the_report() -> None:
    data = {"x": torch.randn(400, WIDTH)}
    model = moec.compile(Moe(), (torch.randn(5, WIDTH),), quant="int4", calib=data)
    (line,) = model.report().quantised
    assert line.solved is not None
    assert line.nearest is not None
    assert line.solved < line.nearest
    assert line.covered == line.parts
    report = model.report()
    assert Report.of_dict(report.to_dict()) == report
    assert "error when rounded to nearest" in str(report)
    assert "too few rows" not in str(report)
    assert model.checked is not None


def test_too_little_data_is_said() -> None:
    data = {"x": torch.randn(20, WIDTH)}
    model = moec.compile(Moe(), (torch.randn(5, WIDTH),), quant="int4", calib=data, build=False)
    (line,) = model.report().quantised
    assert line.few == tuple(range(line.parts))
    assert "note: too few rows for experts 0..3" in str(model.report())


def test_linear_layers_see_all_tokens() -> None:
    text = "linears=int4,head=int4"
    data = {"input": torch.randn(400, WIDTH)}
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
    )
    compiled_model = moec.compile(model, (torch.randn(5, WIDTH),), quant=text, calib=data)
    for line in compiled_model.report().quantised:
        assert line.fewest == 400
        assert line.solved is not None
        assert line.solved < (line.nearest or 0)


def test_data_that_nothing_asked_for_are_refused() -> None:
    with pytest.raises(UsageError, match="--calib is for passes that change the model and for --q"):
        moec.compile(None, calib={"x": torch.randn(4, WIDTH)})
    with pytest.raises(UsageError, match="--budget limits passes that change the model"):
        moec.compile(None, quant="int8", budget="kl<=1")
