"""fold-lora: adapters are merged into the weights, and experts with adapters are recognised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import moec
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.specialise.fold_lora import FoldLora

ADAPTER = """
  y: f32[T, 6] = aten.linear.default(x, w, bias) @ up
  a: f32[T, 2] = aten.linear.default(x, down) @ up.a
  b: f32[T, 6] = aten.linear.default(a, up) @ up.b
  c: f32[T, 6] = aten.mul.Tensor(b) <other=2.0> @ up
  z: f32[T, 6] = aten.add.Tensor(y, c) @ up
"""
LEARNED = ADAPTER.replace("aten.mul.Tensor(b) <other=2.0>", "aten.mul.Tensor(scale, b)")
PLAIN = ADAPTER.replace("add.Tensor(y, c)", "add.Tensor(b, y)")
TWICE = ADAPTER.replace("  z:", "  first:") + (
    "  d: f32[T, 2] = aten.linear.default(x, other) @ up.d\n"
    "  e: f32[T, 6] = aten.linear.default(d, up) @ up.e\n"
    "  z: f32[T, 6] = aten.add.Tensor(first, e) @ up\n"
)


def model(body: str, dtype: str = "f32", seed: int = 0) -> Program:
    graph = parse(
        f"""
    graph main(x: f32[T, 8], z0: f32[T, 8]; w: f32[6, 8], bias: f32[6], down: f32[2, 8],
               up: f32[6, 2], other: f32[2, 8], scale: f32[1], little: f32[2]) {{
      size T in [0, inf]{body}
      return z
    }}""".replace("f32", dtype)
    )
    generator = torch.Generator().manual_seed(seed)
    result = {p.name: torch.randn([int(d) for d in p.shape], generator=generator)
            for p in graph.params}  # fmt: skip
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Program(graph, {name: tensor.to(kind) for name, tensor in result.items()})


def folded(program: Program) -> PassResult:
    return run(program, [FoldLora()])[-1]


def test_text(golden: Any) -> None:
    golden(print_graph(folded(model(ADAPTER)).program.graph))


@given(
    body=st.sampled_from([ADAPTER, LEARNED, PLAIN, TWICE]),
    rows=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 99),
)
def test_same_numbers(body: str, rows: int, seed: int) -> None:
    """8 products of numbers of about 4, summed in another order: 1e-5 of the greatest."""
    before = model(body, seed=seed)
    step = folded(before)
    assert step.rewrites == 1 + (body is TWICE)
    assert [op.name for op in step.program.graph.ops] == ["aten.linear.default"]
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    (right,) = evaluate(before.graph, [x, x], before.weights)
    (result,) = evaluate(step.program.graph, [x, x], step.program.weights)
    scale = float(right.abs().max()) if rows else 1.0
    torch.testing.assert_close(result, right, rtol=0, atol=1e-5 * max(scale, 1.0))


def test_bf16_is_rounded_once() -> None:
    before = model(ADAPTER, "bf16")
    weights = {name: tensor.float() for name, tensor in before.weights.items()}
    exact = weights["w"] + 2 * weights["up"] @ weights["down"]
    step = folded(before)
    assert torch.equal(step.program.weights["w.folded"], exact.bfloat16())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (ADAPTER.replace("linear.default(x, down)", "linear.default(z0, down)"),
         "the layer reads x, and its adapter z0"),
        (ADAPTER.replace("(x, down)", "(x, down, little)"), "the adapter has a bias"),
        (ADAPTER.replace("add.Tensor(y, c)", "add.Tensor(y, c) <alpha=3>"),
         "the sum counts one side 3 times"),
        ("\n  made: f32[6, 8] = aten.mm.default(h, x)\n" + ADAPTER.replace("(x, w, bias)",
         "(x, made, bias)"), "turned is computed from the inputs, not stored"),
        (ADAPTER.replace("z: f32[T, 6] = aten.add.Tensor(y, c)",
                         "s: f32[1, 6] = aten.slice.Tensor(w) <end=1>\n  z: f32[T, 6] = "
                         "aten.add.Tensor(y, c)").replace("y: f32[T, 6] = aten.linear.default("
                         "x, w, bias)", "y: f32[T, 6] = aten.linear.default(x, w, bias)")
         .replace("c: f32[T, 6] = aten.mul.Tensor(b) <other=2.0>",
                  "m: f32[T, 1] = aten.mean.dim(x) <dim=(1), keepdim=true>\n"
                  "  n: f32[1, 1] = aten.mean.dim(m) <dim=(0), keepdim=true>\n"
                  "  c: f32[T, 6] = aten.mul.Tensor(b, n)"),
         "m is computed from the inputs, not stored"),
    ],
    ids=["other input", "bias", "alpha", "weight", "scale"],
)  # fmt: skip
def test_declines(body: str, reason: str) -> None:
    body = body.replace("(h, x)", "(turned, x)")
    if "turned" in body:
        body = body.replace(
            "\n  made:", "\n  mixed: f32[T, 6] = aten.linear.default(z0, w)\n"
            "  turned: f32[6, T] = aten.permute.default(mixed) <dims=(1, 0)>\n  made:")  # fmt: skip
    step = folded(model(body))
    assert step.rewrites == 0
    assert [reason in d.reason for d in step.declined] == [True], step.declined


# ---- experts ---------------------------------------------------------------------------

D, H, E = 8, 12, 3


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, 2.0
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.b(self.a(x)) * self.scale
        return result


class Model(nn.Module):
    """Experts that are one frozen layer, each with an adapter of its own (Uni-MoE)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, up, down = nn.Linear(D, E), nn.Linear(D, H), nn.Linear(H, D)
        self.up = nn.ModuleList([Adapted(up) for _ in range(E)])
        self.down = nn.ModuleList([Adapted(down) for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).topk(2, -1)
        weights, y = weights.softmax(-1), torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            y = y + down(F.silu(up(x))) * (weights * (ids == e)).sum(-1, keepdim=True)
        return y


def test_adapted_experts_are_recognised() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(5, D)
    plain = moec.compile(model, (x,), build=False)
    assert [block.experts for block in plain.blocks] == [E]
    compiled = moec.compile(model, (x,), passes="+fold-lora")
    assert [block.experts for block in compiled.blocks] == [E]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    merged, shared, adapters = E * 2 * D * H, 2 * D * H, E * 2 * 2 * (D + H)
    report = " ".join(str(compiled.report()).split())
    more = f"{4 * (merged - shared - adapters):,} bytes of weights more"
    assert f"fold-lora: {2 * E} adapters; {more}" in report
