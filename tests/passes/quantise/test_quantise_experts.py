"""The weights of experts in few bits: results of the pass, refusals, unchanged ops."""

from __future__ import annotations

import pytest
import torch

from moec.ir.formats.integer import dequantise, quantise
from moec.ir.formats.notation import parse
from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse as read
from moec.ir.text import print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.quantise import codes
from moec.passes.quantise.quantise_experts import QuantiseExperts

GRAPH = """
graph main(x: f32[T, 64], order: i32[2*T], ends: i32[2], scale: f32[T, 2];
           gate: f32[2, 32, 64], up: f32[2, 32, 64], b: f32[2, 32], c: f32[2, 32],
           down: f32[2, 64, 32], head: f32[5, 64]) {
  size T in [0, inf]
  h: f32[2*T, 32] = grouped.linear(x, ends, gate, up, b, c, order, scale)
    <matrices=2, dtype=f32, biased=true, gather=2, scaled=true> @ mlp.experts {
    graph body(g: f32[R, 32], u: f32[R, 32]) {
      a: f32[R, 32] = aten.silu.default(g)
      p: f32[R, 32] = aten.mul.Tensor(a, u)
      return p
    }
  }
  y: f32[2*T, 64] = grouped.linear(h, ends, down) <matrices=1, dtype=f32> @ mlp.experts
  z: f32[2*T, 5] = aten.linear.default(y, head) @ head
  return z
}"""


def program(text: str = GRAPH) -> Program:
    graph = read(text)
    weights = {p.name: torch.randn([int(d) for d in p.shape]) / 8 for p in graph.params}
    return Program(graph, weights)


def quantised(of: Program, text: str) -> PassResult:
    return run(of, [QuantiseExperts(parse(text))], stage=Stage.GROUPED)[-1]


@pytest.mark.parametrize("text", ["int8", "int4:32:asymmetric", "mxfp4", "mxfp4:rows16"])
def test_text(text, golden):
    golden(print_graph(quantised(program(), text).program.graph))


@pytest.mark.parametrize("text", ["int8:32", "int4:asymmetric", "mxfp4", "int8:rows16"])
def test_it_means_the_graph_with_rounded_weights(text):
    """But for the rounding of rows: half a 127th of the greatest of a block, in sums of 64; a 257th
    of that in 16 bits."""
    before = program()
    after = quantised(before, text)
    assert after.changed
    format = parse(text)
    rounded = dict(before.weights)
    for name in ("gate", "up", "down"):
        codes = quantise(format, before.weights[name])
        rounded[name] = dequantise(format.kind, codes.codes, codes.scales, codes.zeros)
        stored = after.program.weights[f"{name}.codes"]
        assert torch.equal(stored, codes.codes)
        assert name not in after.program.weights
    inputs = [
        torch.randn(3, 64),
        torch.tensor([4, 0, 3, 1, 2, 5], dtype=torch.int32),
        torch.tensor([2, 5], dtype=torch.int32),
        torch.rand(3, 2),
    ]
    (actual,) = evaluate(after.program.graph, inputs, after.program.weights)
    (expected,) = evaluate(before.graph, inputs, rounded)
    finer = 257 if format.row_bits == 16 else 1
    assert 0 < (actual - expected).norm() <= 0.02 / finer * expected.norm()
    assert not actual[5].any()


def test_weights_that_two_ops_read_are_quantised_once():
    twice = GRAPH.replace(
        "z: f32",
        "y2: f32[2*T, 64] = grouped.linear(h, ends, down) <matrices=1, dtype=f32>\n z: f32",
    ).replace("return z", "return z, y2")
    graph = quantised(program(twice), "int4").program.graph
    assert [p.name for p in graph.params].count("down.codes") == 1


@pytest.mark.parametrize(
    ("text", "change", "says"),
    [
        ("int4:64", lambda w: w, "blocks of 64 do not divide the 32 weights of a row"),
        (
            "int8",
            lambda w: {**w, "down": w["down"].index_fill(2, torch.tensor([3]), torch.nan)},
            "the weights down hold an infinity or a NaN",
        ),
        (
            "int8",
            lambda w: {n: t for n, t in w.items() if n != "down"},
            "the weights down are computed at run time",
        ),
    ],
)
def test_declines(text, change, says):
    """With the reason; what else there is, is quantised all the same."""
    before = program()
    step = quantised(Program(before.graph, change(dict(before.weights))), text)
    (declined,) = step.declined
    assert (declined.where, declined.reason) == ("mlp.experts", says)
    names = [op.name for op in step.program.graph.ops]
    assert names == ["grouped.quantised", "grouped.linear", "aten.linear.default"]


def test_declines_rows_too_long_for_one_scale(monkeypatch):
    """Their sums would leave int32."""
    monkeypatch.setattr(codes, "MOST_SUMMED", 32)
    (declined,) = quantised(program(), "int8").declined
    assert declined.reason == "a row of 64 weights is too long for one scale: choose a block"
    assert not quantised(program(), "int8:32").declined


def test_declines_what_is_not_of_floats_of_a_kernel():
    wide = read(GRAPH.replace("f32", "f64"))
    weights = {p.name: torch.randn([int(d) for d in p.shape]).double() for p in wide.params}
    step = quantised(Program(wide, weights), "int8")
    assert "are not of f32, bf16, f16" in step.declined[0].reason
