"""One op whose kernel's output the test writes."""

from unittest.mock import Mock

import pytest
import torch

from moec.ir.formats.integer import quantise, round_rows
from moec.ir.formats.notation import parse as format_of
from moec.ir.graph import Program
from moec.ir.interpret import run_in_float32
from moec.ir.interpret.evaluate import evaluate
from moec.ir.ops.experts import quantised_linear
from moec.ir.text import parse
from moec.verify.kernels import SAMPLES, ProgramParts, check_kernels
from moec.verify.recording import KernelRecord

TEXT = """graph main(x: f32[2, 20, 64]; y.codes: u8[96, 64], y.scales: bf16[96, 2]) {
  y: f32[2, 20, 96] = nn.quantised_linear(x, y.codes, y.scales) <kind="int8">
  return y
}"""


def test_only_rows_that_differ_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, x = quantise(format_of("int8:32"), torch.randn(1, 96, 64)), torch.randn(2, 20, 64)
    program = Program(parse(TEXT), {"y.codes": stored.codes[0], "y.scales": stored.scales[0]})
    (right,), spy = evaluate(program.graph, [x], program.weights), Mock(side_effect=round_rows)
    monkeypatch.setattr(quantised_linear, "round_rows", spy)
    for error, expected in ((0.0, [40, 40]), (9.0, [40, 40, *[1] * (SAMPLES - 1)])):
        spy.reset_mock()
        y = right + error * (torch.arange(40) == 27).view(2, 20, 1)
        call = KernelRecord("main", {"x": x}, {"x": x.shape}, True, {"y": y}, {}, {"y": "k"})
        checked = check_kernels(ProgramParts(program, frozenset({"y"})), [call])
        assert (checked.wrong is None) == (error == 0)
        assert [each.args[0].shape[:-1].numel() for each in spy.call_args_list] == expected


def test_of_a_table_only_rows_are_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "graph main(x: i64[3]; w: bf16[9, 4]) {\n y: bf16[3, 4] = aten.embedding.default(w, x)\n"
    table, ids, wide = torch.randn(9, 4).bfloat16(), torch.tensor([8, 0, 8]), run_in_float32.wide
    monkeypatch.setattr(
        run_in_float32, "wide", lambda t: pytest.fail("all") if t is table else wide(t)
    )
    run = run_in_float32.in_float32(Program(parse(f"{text} return y\n}}"), {"w": table}))
    eager = run_in_float32.eager_in_float32(lambda i: (torch.nn.functional.embedding(i, table),))
    assert all(torch.equal(rows, table[ids].float()) for rows in (*run([ids]), *eager(ids)))


@pytest.mark.parametrize(("off", "is_right"), [(0.0, True), (2e-4, False)])
def test_a_long_sum_may_be_off_by_its_roundings(off: float, is_right: bool) -> None:
    """By a kernel that adds 16,384 terms one after the other; one of its results may be wrong."""
    torch.manual_seed(0)
    types, y = "x: f32[8, 16384]; w: f32[64, 16384]", torch.zeros(8, 64)
    text = f"graph main({types}) {{\n  y: f32[8, 64] = aten.linear.default(x, w)\n  return y\n}}"
    x, w = torch.randn(8, 16_384), torch.randn(64, 16_384)
    for column in range(16_384):
        y += x[:, None, column] * w[:, column]
    y[0, 0] += off * y.std()
    call = KernelRecord("main", {"x": x}, {"x": x.shape}, True, {"y": y}, {}, {"y": "k"})
    checked = check_kernels(ProgramParts(Program(parse(text), {"w": w}), frozenset({"y"})), [call])
    assert (checked.wrong is None) == is_right


ROUTE = """graph main(logits: f16[5, 4]) {{
  w: f16[5, 2], i: i64[5, 2] = moe.route(logits) <k=2, score="{0}", dtype="{1}", score_dtype="{1}">
  return w, i
}}"""
SECOND = {"softmax": {"f16": (0, 2), "f32": (2,)}, "sigmoid": {"f16": (0, 1, 2)}}


@pytest.mark.parametrize("row", [0, 4])
@pytest.mark.parametrize("second", range(-1, 4))
@pytest.mark.parametrize(("score", "dtype"), [(s, d) for s in SECOND for d in SECOND[s]])
def test_of_scores_that_are_equal_in_16_bits(score: str, dtype: str, second: int, row: int) -> None:
    """Scores of 1e-14 beside one of 1 are 0 in f16, of which the first is chosen, and sigmoids of
    12 and more are 1; other rows have no ties. None is chosen twice."""
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).half()
    logits[row] = torch.tensor([12.0, 13.0, 14.0, 44.0])
    scores = logits.float().softmax(-1) if score == "softmax" else logits.float().sigmoid()
    weights, ids = scores.topk(2)
    ids[row, 0], ids[row, 1] = 3, second
    results, graph = {"w": weights.half(), "i": ids}, parse(ROUTE.format(score, dtype))
    kernels, shapes = dict.fromkeys(results, "route"), {"logits": logits.shape}
    call = KernelRecord("main", {"logits": logits}, shapes, True, results, {}, kernels)
    checked = check_kernels(ProgramParts(Program(graph, {}), frozenset(results)), [call])
    assert (checked.wrong is None) == (second in SECOND[score][dtype])
