"""Layers with experts of few bits on emulated GPUs equal the interpreted graph."""

from __future__ import annotations

import pytest
import torch

from moec.codegen.backends.cuda.backend import CUDA, CUDA_TEXT
from moec.codegen.package import build
from moec.ir.formats.notation import parse
from moec.ir.graph import Module, Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse as read
from moec.passes.core.runner import run
from moec.passes.quantise.quantise_experts import QuantiseExperts
from tests.cuda_emulator.emulate import SCHEDULES, SM_80
from tests.cuda_emulator.models import emulated_model

GRAPH = """
graph main(x: f32[T, 64], i: i64[T, 2], s: f32[T, 2];
           gate: f32[3, 32, 64], up: f32[3, 32, 64], down: f32[3, 64, 32]) {
  size T in [0, inf]
  order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>
  h: f32[2*T, 32] = grouped.linear(x, ends, gate, up, order) <matrices=2, dtype=f32, gather=2> {
    graph body(g: f32[R, 32], u: f32[R, 32]) {
      a: f32[R, 32] = aten.silu.default(g)
      p: f32[R, 32] = aten.mul.Tensor(a, u)
      return p
    }
  }
  y: f32[2*T, 64] = grouped.linear(h, ends, down) <matrices=1, dtype=f32>
  out: f32[T, 64] = moe.combine(y, slots, s) <k=2, tokens={T}, dtype=f32, weighted=true>
  return out
}"""


def program(format: str) -> Program:
    graph = read(GRAPH)
    generator = torch.Generator().manual_seed(1)
    shapes = {param.name: [int(size) for size in param.shape] for param in graph.params}
    weights = {n: torch.randn(shape, generator=generator) / 8 for n, shape in shapes.items()}
    passes = [QuantiseExperts(parse(format))]
    return run(Program(graph, weights), passes, stage=Stage.GROUPED)[-1].program


@pytest.mark.parametrize("format", ["int8:asymmetric", "fp8:32", "mxfp4:rows16"])
def test_layers_equal_their_meaning(format: str) -> None:
    """A row halfway between two integers may be rounded to either: an error of a 127th of it."""
    quantised = program(format)
    assert {op.name for op in quantised.graph.ops} >= {"grouped.quantised"}
    layer = emulated_model(build(Module.of(quantised), SM_80, backend=CUDA_TEXT))
    for number, tokens in enumerate((0, 1, 7)):
        inputs = {
            "x": torch.randn(tokens, 64),
            "i": torch.rand(tokens, 3).argsort(1)[:, :2].contiguous(),
            "s": torch.rand(tokens, 2),
        }
        (expected,) = evaluate(quantised.graph, list(inputs.values()), quantised.weights)
        (result,) = layer(inputs, schedule=SCHEDULES[number]).values()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-3)


_SORT = "order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>"
_LAYER = f"""graph main(x: f32[T, 64], i: i64[T, 2]; c: u8[3, 4, 64], s: bf16[3, 4, 1]) {{
  {_SORT}
  y: f32[2*T, 4] = grouped.quantised(x, ends, c, s, order) <matrices=1, kind="int8", dtype=f32,
    gather=2>
  return y
}}"""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("", "", "rows that belong to no expert are read, and the kernel does not compute them"),
        ("];", "],", "a stack of its weights is computed, not a weight of the model"),
        ("gather=2", "gather=2, exact_rows=true", "its rows must not be rounded (:rows16)"),
        (", 64]", ", 40]", "16 codes, which are loaded together, would have two scales"),
    ],
)
def test_why_there_is_no_kernel(old: str, new: str, reason: str) -> None:
    graph = read(_LAYER.replace(old, new) if old else _LAYER)
    (refusal,) = CUDA.select(graph).refusals
    assert refusal.reason == f"quantised: {reason}"
