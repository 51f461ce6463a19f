"""Layers with compressed experts on emulated GPUs equal the interpreted graph."""

from __future__ import annotations

import pytest
import torch

from moec.codegen.backends.cuda.backend import CUDA, CUDA_TEXT
from moec.codegen.package import build
from moec.formats.compressed import PARTS, compress, grid_module
from moec.interpret.evaluate import evaluate
from moec.ir.graph import Module, Program
from moec.ir.text import parse
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, needs_compiler
from tests.cuda_emulator.models import emulated_model

LAYER = """graph main(x: f32[T, 72], i: i64[T, 2], s: f32[T, 2];
           {params}) {{
  size T in [0, inf]
  order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>
  h: f32[2*T, 40] = grouped.compressed(x, ends, {gate}, {up}, order)
    <matrices=2, kind="{kind}", dtype=f32, gather=2> {{
    graph body(g: f32[R, 40], u: f32[R, 40]) {{
      a: f32[R, 40] = aten.silu.default(g)
      p: f32[R, 40] = aten.mul.Tensor(a, u)
      return p
    }}
  }}
  y: f32[2*T, 72] = grouped.compressed(h, ends, {down}) <matrices=1, kind="{kind}", dtype=f32>
  out: f32[T, 72] = moe.combine(y, slots, s) <k=2, tokens={{T}}, dtype=f32, weighted=true>
  return out
}}"""
SHAPES = {"gate": (3, 40, 72), "up": (3, 40, 72), "down": (3, 72, 40)}
TYPES = {torch.int16: "i16", torch.uint8: "u8", torch.bfloat16: "bf16", torch.int64: "i64"}


def program(kind: str) -> Program:
    generator, module = torch.Generator().manual_seed(1), grid_module(kind)
    weights, names = {}, {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator) / 4
        grid = module.grid_of(weight)
        parts = compress(kind, module.codes_of(weight, grid), grid)
        named = {f"{name}_{part}": t for part, t in zip(PARTS[kind], parts, strict=True)}
        names[name] = ", ".join(named)
        weights |= named
    params = ", ".join(f"{n}: {TYPES[t.dtype]}{list(t.shape)}" for n, t in weights.items())
    return Program(parse(LAYER.format(params=params, kind=kind, **names)), weights)


@pytest.mark.parametrize("kind", ["ternary", "2bit"])
@needs_compiler
def test_layers_equal_their_meaning(kind: str) -> None:
    compressed = program(kind)
    layer = emulated_model(build(Module.of(compressed), SM_80, backend=CUDA_TEXT))
    kernels = [name for _, name in layer.executor.package.kernels]
    assert kernels.count({"ternary": "ternary", "2bit": "two_bits"}[kind]) == 2
    for number, tokens in enumerate((0, 1, 7)):
        inputs = {
            "x": torch.randn(tokens, 72),
            "i": torch.rand(tokens, 3).argsort(1)[:, :2].contiguous(),
            "s": torch.rand(tokens, 2),
        }
        (expected,) = evaluate(compressed.graph, list(inputs.values()), compressed.weights)
        (result,) = layer(inputs, schedule=SCHEDULES[number]).values()
        # A value halfway between two integers may be rounded to either: a 32767th of the greatest.
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("grid", "columns", "reason"),
    [
        ("bf16", 4, "rows that belong to no expert are read, and the kernel does not compute them"),
        ("f32", 4, "its rows have values that are not bf16"),
        ("bf16", 7, "its 7 columns cannot be stored as pairs"),
    ],
)
def test_why_there_is_no_kernel(grid: str, columns: int, reason: str) -> None:
    parts = f"p: i64[3, {columns}, 2], g: {grid}[3, {columns}, 2]"
    text = f"""graph main(x: f32[T, 64], i: i64[T, 2]; {parts}) {{
      order: i32[2*T], slots: i32[T, 2], ends: i32[3] = moe.sort(i) <num_experts=3>
      y: f32[2*T, {columns}] = grouped.compressed(x, ends, p, g, order)
        <matrices=1, kind="2bit", dtype=f32, gather=2>
      return y
    }}"""
    (refusal,) = CUDA.select(parse(text)).refusals
    assert refusal.reason == f"compressed: {reason}"
