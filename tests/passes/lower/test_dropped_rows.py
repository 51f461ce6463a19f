"""Rows of choices that no expert takes stay 0 where an expert's body does not end in a product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moec
from moec.ir.graph import Graph, Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import run
from moec.passes.lower.expand_experts import ExpandExperts

BODIES = {
    "a product": "y: f32[R, 8] = aten.linear.default(bx, b1)",
    "an activation of it": "h: f32[R, 8] = aten.linear.default(bx, b1)\n"
    "y: f32[R, 8] = aten.silu.default(h)",
    "the rows beside it": "h: f32[R, 8] = aten.linear.default(bx, b1)\n"
    "y: f32[R, 8] = aten.add.Tensor(bx, h)",
    "one at 0": "h: f32[R, 8] = aten.linear.default(bx, b1)\n"
    "y: f32[R, 8] = aten.sigmoid.default(h)",
    "a norm with a weight": "h: f32[R, 8] = aten.linear.default(bx, b1)\n"
    "y: f32[R, 8] = aten.layer_norm.default(h, n, n) <normalized_shape=(8), eps=1e-05>",
}
CLEARED = {"the rows beside it", "one at 0", "a norm with a weight"}
CHOICES = {
    "limited": 'i: i64[T, 2] = moe.capacity(t) <num_experts=4, capacity=2, order="token">',
    "all": "i: i64[T, 2] = aten.clone.default(t)",
}


def block(body: str, choice: str) -> Graph:
    return parse(f"""
    graph main(x: f32[T, 8], logits: f32[T, 4]; w1: f32[4, 8, 8], w2: f32[4, 8]) {{
      v: f32[T, 2], t: i64[T, 2] = aten.topk.default(logits) <k=2, dim=-1>
      {choice}
      rows: f32[2*T, 8], order: i32[2*T], ends: i32[4] = moe.dispatch(x, i) <num_experts=4>
      out: f32[2*T, 8] = moe.experts(rows, ends, w1, w2) {{
        graph body(bx: f32[R, 8]; b1: f32[8, 8], n: f32[8]) {{
          {body}
          return y
        }}
      }}
      y: f32[T, 8] = moe.combine(out, order, v) <k=2, tokens={{T}}, dtype=f32, weighted=true>
      return y
    }}""")


def expanded(graph: Graph) -> Graph:
    (_, step) = run(Program(graph, {}), [ExpandExperts()], stage=Stage.MOE)
    return step.program.graph


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_do_not_end_in_a_product_are_followed_by_one_op(name: str) -> None:
    limited = expanded(block(BODIES[name], CHOICES["limited"]))
    cleared = [op for op in limited.ops if op.name == "aten.masked_fill.Scalar"]
    assert len(cleared) == (name in CLEARED)


@pytest.mark.parametrize("name", sorted(CLEARED))
def test_choices_that_experts_take_are_not_cleared(name: str) -> None:
    graph = expanded(block(BODIES[name], CHOICES["all"]))
    assert not any(op.name == "aten.masked_fill.Scalar" for op in graph.ops)


@settings(max_examples=20)
@given(st.integers(0, 9), st.sampled_from(sorted(BODIES)), st.integers(0, 99))
def test_the_numbers_hold(tokens: int, name: str, seed: int) -> None:
    before = block(BODIES[name], CHOICES["limited"])
    torch.manual_seed(seed)
    weights = {p.name: torch.randn([int(d) for d in p.shape]) for p in before.params}
    inputs = [torch.randn(tokens, 8), torch.randn(tokens, 4)]
    (expected,) = evaluate(before, inputs, weights)
    (actual,) = evaluate(expanded(before), inputs, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Limited(nn.Module):
    """Residual experts that take at most 2 tokens each; weights of the others are not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            rows, slots = rows[:2], slots[:2]
            y.index_add_(0, rows, (x[rows] + expert(x[rows])) * weights[rows, slots, None])
        return y


def test_the_code_of_experts_with_a_capacity() -> None:
    torch.manual_seed(0)
    module = Limited().eval()
    compiled = moec.compile(module, (torch.randn(9, 8),))
    assert len(compiled.blocks) == 1
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(compiled(x), module(x).detach(), rtol=1e-5, atol=1e-5)


def test_choices_among_more_than_the_experts_with_a_network_may_be_dropped() -> None:
    """Ids of experts without a network have rows after the last end."""
    graph = block(BODIES["the rows beside it"], CHOICES["all"])
    for logits, cleared in ((4, 0), (6, 1)):
        text = print_graph(graph).replace("logits: f32[T, 4]", f"logits: f32[T, {logits}]")
        ops = expanded(parse(text)).ops
        assert len([op for op in ops if op.name == "aten.masked_fill.Scalar"]) == cleared
