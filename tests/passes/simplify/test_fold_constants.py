"""Values that depend on weights alone become weights, if that costs little memory."""

import torch

from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
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


MIXTURE = """
graph main(x: f32[T, 4]; w0: f32[6, 4], w1: f32[6, 4], a: f32[2]) {
  first: f32[1] = aten.slice.Tensor(a) <start=0, end=1>
  second: f32[1] = aten.slice.Tensor(a) <start=1, end=2>
  m0: f32[6, 4] = aten.mul.Tensor(w0, first)
  m1: f32[6, 4] = aten.mul.Tensor(w1, second)
  w: f32[6, 4] = aten.add.Tensor(m0, m1)
  y: f32[T, 6] = aten.linear.default(x, w)
  return y
}"""


def folded_text(text: str, limit: int = 0) -> Program:
    graph = parse(text)
    weights = {p.name: torch.randn(*map(int, p.shape)) for p in graph.params}
    before = Program(graph, weights)
    after = run(before, [FoldConstants(limit)])[-1].program
    x = [torch.randn(3, 4)]
    for a, b in zip(
        evaluate(after.graph, x, after.weights), evaluate(graph, x, weights), strict=True
    ):
        assert torch.equal(a, b)
    return after


def test_a_large_mixture_of_weights_takes_their_place():
    program = folded_text(MIXTURE)
    assert [op.name for op in program.graph.ops] == ["aten.linear.default"]
    assert set(program.weights) == {"w"}


def test_weights_that_others_read_are_not_replaced():
    text = MIXTURE.replace("return y", "z: f32[T, 6] = aten.linear.default(x, w0)\n  return y, z")
    both = text.replace("z: f32", "u: f32[T, 6] = aten.linear.default(x, w1)\n  z: f32")
    both = both.replace("return y, z", "return y, z, u")
    assert set(folded_text(text).weights) == {"w", "w0"}  # as many bytes as before
    assert "aten.mul.Tensor(w0, first)" in print_graph(folded_text(both).graph)


def test_a_view_of_a_weight_keeps_its_memory():
    text = MIXTURE.replace(
        "return y",
        "h0: f32[3, 4] = aten.slice.Tensor(w0) <end=3>\n"
        "  h1: f32[3, 4] = aten.slice.Tensor(w1) <end=3>\n"
        "  z: f32[T, 3] = aten.linear.default(x, h0)\n"
        "  u: f32[T, 3] = aten.linear.default(x, h1)\n  return y, z, u",
    )
    assert "aten.mul.Tensor(w0, first)" in print_graph(folded_text(text).graph)


def test_a_part_of_the_mixture_that_is_returned_stays():
    text = MIXTURE.replace("return y", "return y, m0")
    assert set(folded_text(text).weights) == {"w", "m0"}


def test_what_would_be_larger_stays():
    text = """
graph main(x: f32[T, 4]; w: f32[1, 4]) {
  wide: f32[6, 4] = aten.repeat.default(w) <repeats=(6, 1)>
  y: f32[T, 6] = aten.linear.default(x, wide)
  return y
}"""
    assert "aten.repeat.default" in print_graph(folded_text(text).graph)
