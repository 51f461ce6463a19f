"""The last product and the sum over choices become one op, if the ops match."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moec.ir.graph import Graph, Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import run
from moec.passes.lower.fuse_combine import FuseCombine

TEXT = """\
graph main(rows: bf16[2*T, 6], experts: i64[T, 2], weights: f32[T, 2];\
 w: bf16[4, 5, 6], b: bf16[4, 5]) {{
  size T in [0, inf]
  order: i32[2*T], slots: i32[T, 2], ends: i32[4] = moe.sort(experts) <num_experts=4>
  y: {dtype}[2*T, 5] = grouped.linear(rows, ends, w{bias}) <matrices=1, {biased}dtype={dtype}>
  z: bf16[T, 5] = moe.combine(y, {places}, weights) <k=2, tokens={{T}}, dtype=bf16, weighted=true>
  return z
}}
"""
PLAIN = {"dtype": "bf16", "bias": "", "biased": "", "places": "order"}
BIASED = {**PLAIN, "bias": ", b", "biased": "biased=true, "}


def fused(form: dict[str, str]) -> tuple[Graph, Graph]:
    graph = parse(TEXT.format(**form))
    return graph, run(Program(graph, {}), (FuseCombine(),), stage=Stage.GROUPED)[-1].program.graph


@pytest.mark.parametrize("form", [PLAIN, BIASED], ids=["plain", "biased"])
def test_golden(form: dict[str, str], golden: Callable[[str], None]) -> None:
    before, after = fused(form)
    golden(print_graph(after))
    inputs = [
        torch.randn(6, 6).bfloat16(),
        torch.tensor([[0, 3], [3, 1], [2, 4]]),
        torch.rand(3, 2),
    ]
    weights = {"w": torch.randn(4, 5, 6).bfloat16(), "b": torch.randn(4, 5).bfloat16()}
    assert torch.equal(evaluate(before, inputs, weights)[0], evaluate(after, inputs, weights)[0])


@pytest.mark.parametrize("form", [{"dtype": "f32"}, {"places": "slots"}])
def test_what_is_summed_otherwise_stays(form: dict[str, str]) -> None:
    """In float32, or given the row of each choice instead of the choice of each row."""
    before, after = fused({**PLAIN, **form})
    assert [op.name for op in after.ops] == [op.name for op in before.ops]
