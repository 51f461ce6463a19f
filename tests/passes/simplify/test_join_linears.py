"""join-linears: layers that read one value become one layer and slices of its result."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.simplify.join_linears import JoinLinears

HEADS = """
graph main(z: f32[T, 4], noise: f32[T, 2]; w0: f32[2, 4], b0: f32[2], w1: f32[3, 4], b1: f32[3],
           w2: f32[2, 4], w3: f32[2, 2], b3: f32[2]) {
  size T in [0, inf]
  mean: f32[T, 2] = aten.linear.default(z, w0, b0) @ heads.0
  other: f32[T, 3] = aten.linear.default(z, w1, b1) @ heads.1
  plain: f32[T, 2] = aten.linear.default(z, w2) @ heads.2
  next: f32[T, 2] = aten.linear.default(mean, w3, b3) @ heads.3
  sum: f32[T, 2] = aten.add.Tensor(next, noise) @ heads
  return sum, other, plain
}"""


def program(text: str = HEADS, seed: int = 0) -> Program:
    graph, generator = parse(text), torch.Generator().manual_seed(seed)
    return Program(graph, {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) for p in graph.params
    })  # fmt: skip


def joined(before: Program, **options: Any) -> PassResult:
    return run(before, [JoinLinears()], stage=Stage.MOE, **options)[-1]


def test_text(golden: Any) -> None:
    """The layer without a bias and the one that reads another value stay."""
    golden(print_graph(joined(program()).program.graph))


@given(rows=st.sampled_from([0, 1, 5]), seed=st.integers(0, 99))
def test_numbers(rows: int, seed: int) -> None:
    """The same sums, in an order that a product of more columns may change: 5 roundings of sums
    below 16 are at most 5e-6."""
    before = program(seed=seed)
    torch.manual_seed(seed)
    result = joined(before)
    assert result.says == ("2 linear layers that read one value become one",)
    inputs = [torch.randn(rows, 4), torch.randn(rows, 2)]
    expected = evaluate(before.graph, inputs, before.weights)
    results = evaluate(result.program.graph, inputs, result.program.weights)
    for ours, right in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-5)


def test_a_weight_that_two_layers_share_is_in_both_parts() -> None:
    text = HEADS.replace("(z, w1, b1)", "(z, w0, b0)").replace(
        "other: f32[T, 3]", "other: f32[T, 2]"
    )
    before = program(text)
    result = joined(before)
    inputs = [torch.randn(3, 4), torch.randn(3, 2)]
    expected = evaluate(before.graph, inputs, before.weights)
    results = evaluate(result.program.graph, inputs, result.program.weights)
    for ours, right in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-6)


def test_a_weight_that_is_computed_stays() -> None:
    text = HEADS.replace("  mean:", "  c: f32[2, 4] = aten.relu.default(w0)\n  mean:").replace(
        "(z, w0, b0)", "(z, c, b0)"
    )
    result = joined(program(text))
    assert (result.rewrites, result.says) == (0, ())


def test_without_fuel_nothing_changes() -> None:
    result = joined(program(), fuel=0)
    assert result.rewrites == 0
    assert print_graph(result.program.graph) == print_graph(parse(HEADS))
