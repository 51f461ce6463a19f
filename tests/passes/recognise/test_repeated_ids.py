"""Ids of a token that may be equal: a dispatch that writes once for both is no sum over them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate

D, E = 8, 3
Routing = tuple[Tensor, Tensor]


def first_again(probs: Tensor) -> Routing:
    weights, ids = probs.topk(2)
    return torch.cat([weights, weights[:, :1]], 1), torch.cat([ids, ids[:, :1]], 1)


def argmax_twice(probs: Tensor) -> Routing:
    """Where the other scores underflow to 0, the second choice is expert 0, as the first may be."""
    first = probs.argmax(-1)
    second = probs.masked_fill(F.one_hot(first, E).bool(), 0).argmax(-1)
    ids = torch.stack([first, second], -1)
    return probs.gather(-1, ids), ids


def hashed(probs: Tensor) -> Routing:
    row = torch.arange(probs.shape[0])
    ids = torch.stack([row % E, (2 * row + 1) % E], -1)
    return probs.gather(-1, ids), ids


def scattered(experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    full = x.new_zeros(x.shape[0], E).scatter(1, ids, weights)
    return sum(full[:, e, None] * expert(x) for e, expert in enumerate(experts))


def assigned(experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(ids == e)
        out[token] += expert(x[token]) * weights[token, slot, None]
    return out


def summed(experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Right for equal ids."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        out = out + (weights * (ids == e)).sum(-1, keepdim=True) * expert(x)
    return out


class Layer(nn.Module):
    """x[T, D]: the tokens, after which expert 0 is far ahead of the others for some."""

    def __init__(self, route: Callable[..., Routing], dispatch: Callable[..., Tensor]) -> None:
        super().__init__()
        self.route, self.dispatch = route, dispatch
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, D)) for _ in range(E)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.dispatch(self.experts, x, *self.route(self.gate(x).softmax(-1)))


@pytest.mark.parametrize(
    ("route", "dispatch"),
    [
        (first_again, assigned),
        (argmax_twice, scattered),
        (hashed, summed),
    ],
)
def test_equal_ids_are_as_in_eager(
    route: Callable[..., Routing], dispatch: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    model = Layer(route, dispatch).eval()
    compiled = moec.compile(model, (torch.randn(6, D),), build=False, verify=False)
    if dispatch is summed:
        assert len(compiled.blocks) == 1
    program = compiled.pass_results[-1].program
    for scale in (1, 400):
        x = torch.randn(40, D) * scale
        (y,) = evaluate(program.graph, [x], program.weights)
        # Sums of a few terms in another order.
        torch.testing.assert_close(y, model(x).detach(), rtol=1e-4, atol=1e-5 * scale)


def test_negative_ids_are_no_experts() -> None:
    def few(probs: Tensor) -> Routing:
        weights, ids = probs.topk(2)
        return weights, (ids + 1) * (weights > 0.4) - 1

    torch.manual_seed(0)
    model = Layer(few, summed).eval()
    compiled = moec.compile(model, (torch.randn(6, D),), build=False, verify=False)
    assert len(compiled.blocks) == 1
    program = compiled.pass_results[-1].program
    x = torch.randn(40, D)
    assert (few(model.gate(x).softmax(-1))[1] < 0).any()
    (y,) = evaluate(program.graph, [x], program.weights)
    # Sums of a few terms in another order.
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-4, atol=1e-5)
