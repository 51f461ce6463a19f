"""What depends on weights alone becomes a weight, where that costs little."""

import torch

from moec.interpret.evaluate import evaluate
from moec.ir.graph import Program
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import run
from moec.passes.simplify.fold_constants import FoldConstants

TEXT = """
graph main(x: f32[T, 4]; w: f32[6, 4], s: f32[4]) {
  half: f32[3, 4] = aten.slice.Tensor(w) <dim=0, start=3, end=6>
  r: f32[4] = aten.rsqrt.default(s)
  big: f32[6, 4] = aten.mul.Tensor(w) <other=2.0>
  y: f32[T, 3] = aten.linear.default(x, half)
  z: f32[T, 6] = aten.linear.default(x, big)
  u: f32[T, 4] = aten.mul.Tensor(x, r)
  return y, z, u
}"""


def folded(limit: int) -> Program:
    weights = {"w": torch.randn(6, 4), "s": torch.rand(4) + 1}
    return run(Program(parse(TEXT), weights), [FoldConstants(limit)])[-1].program


def test_views_and_small_results_become_weights(golden):
    golden(print_graph(folded(limit=16).graph))


def test_a_view_shares_memory():
    program = folded(limit=16)
    assert program.weights["half"].data_ptr() == program.weights["w"][3:].data_ptr()


def test_a_large_result_is_left_where_it_is():
    assert "aten.mul.Tensor(w)" in print_graph(folded(limit=16).graph)
    assert "aten.mul.Tensor(w)" not in print_graph(folded(limit=1000).graph)


def test_weights_that_nobody_reads_are_let_go():
    assert set(folded(limit=1000).weights) == {"half", "big", "r"}


def test_the_numbers_hold():
    weights = {"w": torch.randn(6, 4), "s": torch.rand(4) + 1}
    before = Program(parse(TEXT), weights)
    after = run(before, [FoldConstants()])[-1].program
    x = [torch.randn(3, 4)]
    for a, b in zip(
        evaluate(after.graph, x, after.weights), evaluate(before.graph, x, weights), strict=True
    ):
        assert torch.equal(a, b)
