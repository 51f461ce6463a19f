"""What an evaluator holds in memory."""

from __future__ import annotations

import weakref

import torch

from moec.ir.graph import Program
from moec.ir.text import parse
from moec.passes.calibration.data import Calibration
from moec.passes.calibration.evaluator import Evaluator

GRAPH = """
graph main(x: bf16[T, 8]; w: bf16[8, 8], v: bf16[8, 8]) {
  size T in [0, inf]
  a: bf16[T, 8] = aten.linear.default(x, w)
  y: bf16[T, 8] = aten.linear.default(a, v)
  return y
}"""


def test_wide_weights_are_those_of_the_program_that_was_evaluated_last() -> None:
    """Weights that two programs share are widened once; others are not held meanwhile."""
    graph, weights = parse(GRAPH), {name: torch.randn(8, 8).bfloat16() for name in "wv"}
    original = Program(graph, weights)
    evaluator = Evaluator(original, Calibration(((torch.randn(3, 8).bfloat16(),),), 3))
    before = evaluator.widened(original)[1]
    shared, lost = before["w"], weakref.ref(before["v"])
    del before
    assert lost() is not None
    other = Program(graph, {**weights, "v": torch.zeros(8, 8).bfloat16()})
    after = evaluator.widened(other)[1]
    assert after["w"] is shared
    assert lost() is None
    assert evaluator.measure(other)[0].error == 1
