"""Routers that cast from or to float64 compute where eager does: no match leaves the cast out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate

WIDTH, EXPERTS, TOP_K = 8, 6, 2
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]


def in_float32(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(-1, dtype=torch.float32).topk(TOP_K)


def weights_in_float32(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(TOP_K)
    return weights.float(), ids


def cast_between(logits: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = logits.topk(TOP_K)
    return best.float().softmax(-1), ids


def there_and_back(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.float().sigmoid().topk(TOP_K)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), ids


def in_float64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Above logits of 17 all scores are 1 in float32, and different in float64."""
    weights, ids = (logits.double() + 20).sigmoid().topk(TOP_K)
    return weights.to(logits.dtype), ids


class Layer(nn.Module):
    def __init__(self, choose: Choose, form: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.choose, self.form = choose, form
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.stack = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(self.gate(x))
        if self.form == "gathered":
            rows = torch.einsum("td,tkdo->tko", x, self.stack[ids])
            return (rows * weights[..., None]).sum(1).to(x.dtype)
        if self.form == "described":
            ids = torch.from_numpy(ids.numpy())
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if self.form == "static":
                weight = (weights * (ids == number)).sum(-1, keepdim=True)
                y = y + expert(x) * weight
            else:
                tokens, slots = torch.where(ids == number)
                y.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return y


def plain(layer: Layer, x: Tensor) -> Tensor:
    weights, ids = layer.choose(layer.gate(x))
    y = torch.zeros_like(x)
    for number, expert in enumerate(layer.experts):
        tokens, slots = torch.where(ids == number)
        y = y.index_add(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
    return y


@pytest.mark.parametrize(
    ("choose", "form", "dtype"),
    [
        (in_float32, "loop", torch.float64),
        (in_float32, "static", torch.float64),
        (in_float32, "gathered", torch.float64),
        (in_float32, "described", torch.float64),
        (weights_in_float32, "loop", torch.float64),
        (weights_in_float32, "static", torch.float64),
        (cast_between, "loop", torch.float64),
        (there_and_back, "gathered", torch.float64),
        (in_float64, "loop", torch.float32),
        (in_float64, "static", torch.float32),
    ],
)
def test_a_cast_of_float64_stays(choose: Choose, form: str, dtype: torch.dtype) -> None:
    """Exact but for the order of sums."""
    module = Layer(choose, form, dtype).eval()
    x = torch.randn(300, WIDTH, dtype=dtype)
    described = [moec.describe(Layer, forward=plain)] if form == "described" else []
    compiled = moec.compile(module, (x[:7],), build=False, verify=False, descriptions=described)
    assert len(compiled.blocks) == 1
    program = compiled.pass_results[-1].program
    with torch.no_grad():
        expected = module(x)
    (result,) = evaluate(program.graph, [x], program.weights)
    limit = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(result, expected, rtol=limit, atol=limit)
