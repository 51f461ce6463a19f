"""Mixtures that are no block of experts are listed with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moec

D, E = 8, 4


class Levels(nn.Module):
    """The second level of PLE (doi:10.1145/3383313.3412236): experts of one gate read the results
    of different gates."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.second = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.gates = nn.ModuleList(nn.Linear(D, E) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = torch.stack([expert(x).relu() for expert in self.first], 1)
        a, b = ((g(x).softmax(-1).unsqueeze(1) @ shared).squeeze(1) for g in self.gates[:2])
        rows = (a, a, b, b)
        results = [expert(row).relu() for expert, row in zip(self.second, rows, strict=True)]
        weights = self.gates[2](a).softmax(-1).unsqueeze(1)
        return (weights @ torch.stack(results, 1)).squeeze(1)


class Vectors(nn.Module):
    """Mixture of vectors (arXiv 2309.05444): a gate mixes vectors that scale the features."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.linear = nn.Linear(D, E), nn.Linear(D, D)
        self.vectors = nn.Parameter(torch.randn(E, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        return self.linear(x) * torch.einsum("te,ed->td", weights, self.vectors)


class Merged(nn.Module):
    """SMEAR (arXiv 2306.03745): one expert of averaged weights for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(E, D, D)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x.mean(1)).softmax(-1)
        up, down = (torch.einsum("be,edh->bdh", weights, w) for w in (self.up, self.down))
        return torch.bmm(torch.bmm(x, up).relu(), down)


class MergedByToken(Merged):
    """Lory (arXiv 2405.03133) with segments of one token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        up, down = (torch.einsum("bse,edh->bsdh", weights, w) for w in (self.up, self.down))
        hidden = torch.einsum("bsd,bsdh->bsh", x, up).relu()
        return torch.einsum("bsh,bshd->bsd", hidden, down)


class Static(nn.Module):
    """DSelect-k (arXiv 2106.03760) with a static gate: the weights are the same for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(E))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.logits.sigmoid() / self.logits.sigmoid().sum()
        return sum((w * e(x) for w, e in zip(weights, self.experts, strict=True)), start=0 * x)


class Average(Static):
    """THOR (arXiv 2110.04260) at inference: the mean of all experts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


class Columns(nn.Module):
    """Mixture of linear experts (arXiv 2312.06786): all experts are columns of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.gate = nn.Linear(D, 3 * E), nn.Linear(D, 3 * E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).view(-1, 3, E).softmax(-1)
        return (self.heads(x).view(-1, 3, E) * weights).sum(-1)


class Skipping(nn.Module):
    """A layer that only tokens whose score exceeds a threshold go through."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.layer = nn.Linear(D, 1), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).sigmoid()
        rows, y = (scores > 0.5).squeeze(-1), x.clone()
        if rows.any():
            y[rows] = x[rows] + self.layer(x[rows]).relu() * scores[rows]
        return y


class Guarded(nn.Module):
    """No rows are listed: a condition chooses numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0.5, self.layer(x), x)


def test_a_condition_on_numbers_is_no_choice() -> None:
    compiled = moec.compile(Guarded().eval(), (torch.randn(6, D),), build=False, verify=False)
    assert compiled.declined == ()


@pytest.mark.parametrize(
    ("kind", "blocks", "reason"),
    [
        (Levels, 1, "which are not experts of one kind that read the same rows"),
        (Vectors, 0, "a softmax weighs the 4 rows of vectors: vectors, not experts"),
        (
            Merged,
            0,
            "a softmax averages the weights of 4 experts, up, into one expert before any row",
        ),
        (MergedByToken, 0, "a softmax averages the weights of 4 experts, down, into one expert"),
        (Columns, 0, "a softmax weighs 4 parts of each row of linear"),
        (Skipping, 0, "aten.gt.Scalar lists rows by a threshold"),
    ],
)
def test_a_mixture_is_declined_with_a_reason(
    kind: type[nn.Module], blocks: int, reason: str
) -> None:
    torch.manual_seed(0)
    shape = (2, 6, D) if issubclass(kind, Merged) else (6, D)
    compiled = moec.compile(kind().eval(), (torch.randn(shape),), build=False)
    assert min(len(compiled.blocks), 1) == blocks
    assert any(reason in declined.reason for declined in compiled.declined), compiled.declined


@pytest.mark.parametrize("kind", [Static, Average])
def test_a_sum_that_no_token_weighs_is_no_mixture(kind: type[nn.Module]) -> None:
    compiled = moec.compile(kind().eval(), (torch.randn(6, D),), build=False)
    assert compiled.blocks == ()
