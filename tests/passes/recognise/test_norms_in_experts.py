"""Layer norms that are parts of experts, each with a weight and a bias of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate

D, H, E = 8, 12, 4


def first() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))


def between() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H, bias=False), nn.ReLU(), nn.Linear(H, D))


def last() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D), nn.LayerNorm(D))


def plain() -> nn.Sequential:
    norm = nn.LayerNorm(D, elementwise_affine=False)
    return nn.Sequential(norm, nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))


class Loop(nn.Module):
    """Each expert takes at most 5 tokens; `shared` adds a layer weighed by what is left."""

    def __init__(self, experts: list[nn.Sequential], shared: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(experts)
        self.shared = nn.Linear(D, D) if shared else None
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            for weight in norm.parameters():
                nn.init.normal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            rows, slots = rows[:5], slots[:5]
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        if self.shared is not None:
            y = y + (1 - weights.sum(-1, keepdim=True)) * self.shared(x)
        return y


KINDS = {kind.__name__: kind for kind in (between, first, last, plain)}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_experts_with_norms_are_a_block(name: str, shared: bool) -> None:
    torch.manual_seed(0)
    module = Loop([KINDS[name]() for _ in range(E)], shared).eval()
    compiled = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, 2)]
    program = compiled.pass_results[-1].program
    for tokens in (0, 1, 40):
        x = torch.randn(tokens, D)
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, module(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["first", "last"])
def test_code(name: str) -> None:
    torch.manual_seed(0)
    module = Loop([KINDS[name]() for _ in range(E)]).eval()
    compiled = moec.compile(module, (torch.randn(6, D),))
    for tokens in (1, 40):
        x = torch.randn(tokens, D)
        torch.testing.assert_close(compiled(x), module(x).detach(), rtol=1e-4, atol=1e-5)


class OverRows(nn.Module):
    """Normalised over rows and features: rows of an expert meet."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, [x.shape[0], D])


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(D, D), OverRows()) for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(1, -1)
        full = torch.zeros(len(x), E).scatter(1, ids, weights)
        return sum(full[:, e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


def test_a_norm_over_rows_is_refused() -> None:
    compiled = moec.compile(Batched().eval(), (torch.randn(6, D),), build=False, verify=False)
    assert not compiled.blocks
    (reason, *_) = (d.reason for d in compiled.declined)
    assert "aten.layer_norm.default" in reason
    assert "reduces over rows" in reason
