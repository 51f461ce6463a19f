"""Routers of float64 are written out in float64, and those of other floats are left to kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moec
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph, show_attr
from moec.passes.core.runner import Log
from moec.passes.lower.expand_routers import ExpandRouters
from tests.codegen.cpu.routing.test_route import ROUTINGS

EXPERTS = 4


def router(name: str, logits: str, correction: str | None) -> Program:
    routing, experts, _ = ROUTINGS[name]
    more = f", correction: {correction}[{experts}]" if correction else ""
    reads = "logits, correction" if correction else "logits"
    attrs = ", ".join(f"{key}={show_attr(value)}" for key, value in routing.attrs().items())
    graph = parse(
        f"""graph main(logits: {logits}[T, {experts}]{more}) {{
          w: {routing.dtype}[T, {routing.k}], i: i64[T, {routing.k}] = moe.route({reads}) <{attrs}>
          return w, i
        }}"""
    )
    return Program(graph, {})


@pytest.mark.parametrize("correction", ["usual", "f64"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_float64_is_written_out(name: str, correction: str) -> None:
    """With ties, NaN and infinities; a sparsemixer has no meaning for these."""
    _, experts, usual = ROUTINGS[name]
    dtype = usual if correction == "usual" else usual and "f64"
    program = router(name, "f64", dtype)
    expanded = ExpandRouters().run(program, Log())
    assert "moe.route" not in print_graph(expanded.graph)
    assert parse(print_graph(expanded.graph))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, experts, dtype=torch.float64, generator=generator)
    if "phimoe" not in name:
        logits[:10] = logits[:10].round()
        logits[10], logits[11, 3], logits[12, 1:4] = 0.0, torch.nan, torch.inf
        logits[13, ::2] = -torch.inf
        logits[14] = -1e4  # sigmoids of zero, whose sum is epsilon
    inputs = [logits, torch.randn(experts, generator=generator)] if dtype else [logits]
    kinds = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
    inputs[1:] = [tensor.to(kinds[str(dtype)]) for tensor in inputs[1:]]
    expected = evaluate(program.graph, inputs, {})
    results = evaluate(expanded.graph, inputs, {})
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-14, atol=0, equal_nan=True)


def test_other_floats_are_left_to_kernels() -> None:
    for logits, correction in (("f32", "f32"), ("bf16", None)):
        program = router("glm" if correction else "mixtral", logits, correction)
        assert print_graph(ExpandRouters().run(program, Log()).graph) == print_graph(program.graph)


class CloseLogits(nn.Module):
    """The logits of its experts differ by less than float32 can tell."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, 1, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(EXPERTS))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.gate(x) + x[:, :EXPERTS] * 1e-10
        weights, ids = logits.softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == i)
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return y


@pytest.mark.parametrize("tokens", [1, 300])
def test_logits_that_float32_cannot_tell_choose_their_experts(tokens: int) -> None:
    module = CloseLogits().eval()
    compiled = moec.compile(module, (torch.randn(7, 8, dtype=torch.float64),), verify=False)
    assert len(compiled.blocks) == 1
    x = torch.randn(tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)
