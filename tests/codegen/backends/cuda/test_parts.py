"""Kernels that add parts from memory of their own, in a package on an emulated GPU."""

from __future__ import annotations

import pytest
import torch

from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.codegen.package import build
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from tests.cuda_emulator.emulate import SCHEDULES, SM_80
from tests.cuda_emulator.models import EmulatedModel, emulated_model

TEXT = """graph main(x: f32[T, 512], q: bf16[B, 4, 1, 16], k: bf16[B, 2, L, 16]; w: f32[24, 512]) {
  y: f32[T, 24] = aten.linear.default(x, w)
  o: bf16[B, 4, 1, 16] = nn.attention(q, k, k) <scale=0.25>
  return y, o
}"""


@pytest.fixture(scope="module")
def model() -> EmulatedModel:
    graph = parse(TEXT)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 512, generator=generator)
    module = Module.of(Program(graph, {"w": weight}))
    return emulated_model(build(module, SM_80, backend=CUDA_TEXT))


def test_results_are_those_of_torch(model: EmulatedModel) -> None:
    """In parts, and in one part."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 512, generator=generator)
    for schedule, (rows, keys) in zip(SCHEDULES, ((3, 200), (40, 9)), strict=False):
        x = torch.randn(rows, 512, generator=generator)
        q = torch.randn(2, 4, 1, 16, generator=generator).bfloat16()
        k = torch.randn(2, 2, keys, 16, generator=generator).bfloat16()
        y, o = model({"x": x, "q": q, "k": k}, schedule=schedule).values()
        torch.testing.assert_close(torch.as_tensor(y), x @ weight.T, rtol=1e-4, atol=1e-4)
        wide = [t.float() for t in (q, k.repeat_interleave(2, 1), k.repeat_interleave(2, 1))]
        attended = torch.nn.functional.scaled_dot_product_attention(*wide, scale=0.25)
        torch.testing.assert_close(torch.as_tensor(o).float(), attended, rtol=2e-2, atol=2e-2)
