"""Codes chosen on calibration data: better than the nearest where they count, and counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from moec.errors import UsageError
from moec.formats.integer import dequantise, quantise
from moec.formats.notation import parse
from moec.interpret.evaluate import evaluate
from moec.ir.graph import Program
from moec.passes.calibration.data import Calibration
from moec.passes.core.rounding_stats import FEWEST
from moec.passes.quantise.gptq_codes import calibrate, rows_of
from moec.report.report import Report
from tests.capture.modules import WIDTH, Moe
from tests.passes.quantise.test_quantise_experts import GRAPH, program

E, N, K = 3, 24, 64


def rows(*counts: int) -> list[torch.Tensor]:
    """Inputs whose features are correlated: else nothing can be made up for."""
    mixed = torch.randn(K, K) / 8
    return [torch.randn(count, K) @ mixed + torch.randn(count, K) / 4 for count in counts]


@pytest.mark.parametrize("text", ["int4", "int4:32:asymmetric", "int8", "mxfp4"])
def test_products_are_nearer_than_with_the_nearest_codes(text: str) -> None:
    format, weight, seen = parse(text), torch.randn(E, N, K), rows(200, 300, 400)
    made, fit = calibrate("w", format, weight, seen)
    nearest = quantise(format, weight)
    assert torch.equal(made.scales, nearest.scales)
    assert fit.rows_per_expert == (200, 300, 400)
    assert fit.undersampled == ()

    def error(found: Any) -> float:
        values = dequantise(format.kind, found.codes, found.scales, found.zeros)
        pairs = zip(seen, weight, values, strict=True)
        off = sum(float((x @ (a - b).mT).norm()) ** 2 for x, a, b in pairs)
        whole = sum(float((x @ a.mT).norm()) ** 2 for x, a in zip(seen, weight, strict=True))
        return (off / whole) ** 0.5

    assert fit.nearest_error == pytest.approx(error(nearest), rel=1e-3)
    assert fit.gptq_error == pytest.approx(error(made), rel=1e-3)
    assert fit.gptq_error < 0.9 * fit.nearest_error


def test_an_expert_that_saw_too_few_rows_is_rounded_to_nearest() -> None:
    format, weight = parse("int4"), torch.randn(E, N, K)
    made, fit = calibrate("w", format, weight, rows(0, FEWEST - 1, FEWEST))
    nearest = quantise(format, weight)
    assert fit.undersampled == (0, 1)
    assert torch.equal(made.codes[:2], nearest.codes[:2])
    assert not torch.equal(made.codes[2], nearest.codes[2])


def test_experts_are_solved_alike_in_any_number_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    format, weight, seen = parse("int4:32"), torch.randn(E, N, K), rows(90, 80, 70)
    made, _ = calibrate("w", format, weight, seen)
    monkeypatch.setattr("moec.passes.quantise.gptq_codes.HELD", 1)
    again, _ = calibrate("w", format, weight, seen)
    assert torch.equal(made.codes, again.codes)


def test_rows_are_those_that_each_expert_reads() -> None:
    """Of both cases, in order; of experts by ends and order, of a linear layer all."""
    of = program(GRAPH)
    x = torch.randn(3, 64)
    order, ends = torch.tensor([4, 0, 3, 1, 2, 5]), torch.tensor([2, 5])
    case = (x, order.int(), ends.int(), torch.rand(3, 2))
    gate, down, head = of.graph.ops
    found = list(rows_of(of, Calibration((case, case), 6), [gate, down, head]))
    assert torch.equal(found[0][0], x[[2, 0, 2, 0]])
    assert torch.equal(found[0][1], x[[1, 0, 1, 1, 0, 1]])
    graph = of.graph
    hidden = Program(type(graph)(graph.inputs, graph.params, graph.ops, gate.outputs), of.weights)
    (h,) = evaluate(hidden.graph, list(case), of.weights)
    assert torch.equal(found[1][1], h[2:5].repeat(2, 1))
    assert [len(own) for own in found[2]] == [12]


def test_from_compile_to_the_report() -> None:
    data = {"x": torch.randn(400, WIDTH)}
    made = moec.compile(Moe(), (torch.randn(5, WIDTH),), quant="int4", calib=data)
    (line,) = made.report().quantised
    assert line.solved is not None
    assert line.nearest is not None
    assert line.solved < line.nearest
    assert line.covered == line.parts
    report = made.report()
    assert Report.of_dict(report.to_dict()) == report
    assert "error rounded to nearest" in str(report)
    assert "too few rows" not in str(report)
    assert made.checked is not None


def test_too_little_data_is_said() -> None:
    data = {"x": torch.randn(20, WIDTH)}
    made = moec.compile(Moe(), (torch.randn(5, WIDTH),), quant="int4", calib=data, build=False)
    (line,) = made.report().quantised
    assert line.few == tuple(range(line.parts))
    assert "note: too few rows for experts 0..3" in str(made.report())


def test_linear_layers_see_all_tokens() -> None:
    text = "linears=int4,head=int4"
    data = {"input": torch.randn(400, WIDTH)}
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
    )
    made = moec.compile(model, (torch.randn(5, WIDTH),), quant=text, calib=data)
    for line in made.report().quantised:
        assert line.fewest == 400
        assert line.solved is not None
        assert line.solved < (line.nearest or 0)


def test_data_that_nothing_asked_for_are_refused() -> None:
    with pytest.raises(UsageError, match="--calib is for passes that change the model and for --q"):
        moec.compile(None, calib={"x": torch.randn(4, WIDTH)})
    with pytest.raises(UsageError, match="--budget is for passes that change the model"):
        moec.compile(None, quant="int8", budget="kl<=1")
