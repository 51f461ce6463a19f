"""Linear layers in few bits: which are rounded, their results, and which are unchanged."""

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
from moec.passes.quantise.quantise_linears import QuantiseLinears

GRAPH = """
graph main(x: f32[T, 64]; p: f32[32, 64], b: f32[32], q: f32[64, 32], r: f32[32, 64],
           shared: f32[1, 64], table: f32[64, 64]) {
  size T in [0, inf]
  a: f32[T, 32] = aten.linear.default(x, p, b) @ attention.in
  y: f32[T, 64] = aten.linear.default(a, q) @ attention.out
  logits: f32[T, 32] = aten.linear.default(y, r) @ mlp.gate
  wide: f32[T, 32] = aten.mul.Tensor(logits) <other=2.0>
  weights: f32[T, 2], ids: i64[T, 2] = moe.route(wide) <k=2, score="softmax", dtype="f32">
  s: f32[T, 1] = aten.linear.default(y, shared) @ mlp.shared_gate
  some: f32[T, 2] = aten.mul.Tensor(s, weights)
  total: f32[T, 1] = aten.sum.dim_IntList(some) <dim=(1,), keepdim=true>
  z: f32[T, 64] = aten.mul.Tensor(y, total)
  h: f32[T, 64] = aten.linear.default(z, table) @ lm_head
  capped: f32[T, 64] = aten.tanh.default(h)
  return capped
}"""


def program(text: str = GRAPH) -> Program:
    graph = read(text)
    shapes = {p.name: [int(d) for d in p.shape] for p in graph.params}
    return Program(graph, {name: torch.randn(shape) / 8 for name, shape in shapes.items()})


def quantised(of: Program, linears: str | None, head: str | None = None) -> PassResult:
    formats = (None if text is None else parse(text) for text in (linears, head))
    return run(of, [QuantiseLinears(*formats)], stage=Stage.GROUPED)[-1]


def places(step: PassResult) -> list[str]:
    ops = step.program.graph.ops
    return [op.origin for op in ops if op.name == "nn.quantised_linear"]


def test_text(golden):
    golden(print_graph(quantised(program(), "int4:32:asymmetric", "int8").program.graph))


def test_the_head_and_routers_are_left_unless_the_head_is_asked_for():
    """A soft cap, as a scaling, hides neither the head nor the router behind it, which has outputs
    enough to be worth rounding."""
    assert places(quantised(program(), "int8")) == ["attention.in", "attention.out"]
    assert places(quantised(program(), None, "int8")) == ["lm_head"]


def test_scores_that_choose_experts_by_ops_of_torch_are_a_router_too():
    text = GRAPH.replace(
        'moe.route(wide) <k=2, score="softmax", dtype="f32">',
        "aten.topk.default(wide) <k=2>\n"
        "  rows: f32[2*T, 64], order: i32[2*T], ends: i32[32] = moe.dispatch(y, ids) "
        "<num_experts=32>",
    )
    assert places(quantised(program(text), "int8")) == ["attention.in", "attention.out"]


@pytest.mark.parametrize("text", ["int8", "int8:32", "int4:asymmetric", "mxfp4", "int8:rows16"])
def test_it_means_the_graph_with_rounded_weights(text):
    """But for the rounding of rows: half a 127th of the greatest of a block."""
    before = program()
    after = quantised(before, text, text)
    assert after.changed
    format, rounded = parse(text), dict(before.weights)
    for name in ("p", "q", "table"):
        codes = quantise(format, before.weights[name][None])
        zeros = None if codes.zeros is None else codes.zeros[0]
        rounded[name] = dequantise(format.kind, codes.codes[0], codes.scales[0], zeros)
        assert torch.equal(after.program.weights[f"{name}.codes"], codes.codes[0])
        assert name not in after.program.weights
    x = [torch.randn(7, 64)]
    (actual,) = evaluate(after.program.graph, x, after.program.weights)
    (expected,) = evaluate(before.graph, x, rounded)
    assert 0 < (actual - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("text", "change", "where", "says"),
    [
        ("int4:64", {}, "attention.out", "blocks of 64 do not divide the 32 weights of a row"),
        ("int8", {"p": torch.nan}, "attention.in", "the weights p hold an infinity or a NaN"),
        ("int8", {}, "mlp.shared_gate", "it has only 1 outputs: quantising it saves too little"),
    ],
)
def test_declines(text, change, where, says):
    """With the reason; what else there is, is quantised all the same."""
    before = program()
    weights = dict(before.weights)
    for name, value in change.items():
        weights[name] = torch.full_like(weights[name], value)
    step = quantised(Program(before.graph, weights), text)
    assert (where, says) in [(d.where, d.reason) for d in step.declined]
    assert where not in places(step)
    assert places(step)


def test_declines_what_is_not_of_floats_of_a_kernel():
    wide = read(GRAPH.replace("f32", "f64"))
    weights = {p.name: torch.randn([int(d) for d in p.shape]).double() for p in wide.params}
    step = quantised(Program(wide, weights), "int8")
    assert "are not of f32, bf16, f16" in step.declined[0].reason
