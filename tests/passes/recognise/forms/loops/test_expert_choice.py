"""Experts that choose their tokens (arXiv 2202.09368), in loops: each reads the tokens it chose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.passes.recognise.forms.branches.every_expert import SOME

D, E = 8, 4


class Chosen(nn.Module):
    """A row of indices for each expert, added with index_add_."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D)) for _ in range(E)
        )

    def ranked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, rows = self.gate(x).softmax(-1).t().topk(max(1, x.shape[0] * 2 // E), -1)
        return weights, rows

    def forward(self, x: Tensor) -> Tensor:
        (weights, rows), y = self.ranked(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y.index_add_(0, rows[e], expert(x[rows[e]]) * weights[e, :, None])
        return y


class Columns(Chosen):
    """A column of indices for each expert, and results added in place."""

    def forward(self, x: Tensor) -> Tensor:
        weights, rows = self.gate(x).softmax(-1).topk(min(3, x.shape[0]), 0)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y[rows[:, e]] += expert(x[rows[:, e]]) * weights[:, e, None]
        return x + y


class Three(Chosen):
    """Three tokens for each expert, so that there are no fewer."""

    def ranked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, rows = self.gate(x).softmax(-1).t().topk(3, -1)
        return weights, rows


class Sorted(Chosen):
    """The first of a sort; weights are read at both indices."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        rows = scores.t().argsort(-1, descending=True)[:, : max(1, x.shape[0] // E)]
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y.index_add_(0, rows[e], expert(x[rows[e]]) * scores[rows[e], e, None])
        return y


class Unweighted(Chosen):
    def forward(self, x: Tensor) -> Tensor:
        (_, rows), y = self.ranked(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y.index_add_(0, rows[e], expert(x[rows[e]]))
        return y


class Mask(Chosen):
    """A mask of the choices multiplies every expert's results."""

    def forward(self, x: Tensor) -> Tensor:
        weights, rows = self.ranked(x)
        scores = torch.zeros(E, x.shape[0]).scatter(1, rows, weights)
        return sum(scores[e, :, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


class Stacked(Chosen):
    """Texts choose for themselves, and results of experts are stacked: [B, E, C, D]."""

    def forward(self, x: Tensor) -> Tensor:
        texts = x[None]
        scores = self.gate(texts).softmax(-1).transpose(1, 2)
        weights, rows = scores.topk(max(1, x.shape[0] * 2 // E), -1)
        hot = nn.functional.one_hot(rows, x.shape[0]).to(x.dtype)
        read = torch.einsum("becn,bnd->becd", hot, texts)
        y = torch.stack([expert(read[:, e]) for e, expert in enumerate(self.experts)], 1)
        return torch.einsum("becn,bec,becd->bnd", hot, weights, y)[0]


class OtherWeights(Chosen):
    """Weights of the next expert: equal to eager, and no block."""

    def forward(self, x: Tensor) -> Tensor:
        (weights, rows), y = self.ranked(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y.index_add_(0, rows[e], expert(x[rows[e]]) * weights[(e + 1) % E, :, None])
        return y


class Repeated(Chosen):
    """Rows that may repeat are no choice of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        (weights, rows), y = self.ranked(x), torch.zeros_like(x)
        rows = rows // 2
        for e, expert in enumerate(self.experts):
            y.index_add_(0, rows[e], expert(x[rows[e]]) * weights[e, :, None])
        return y


@pytest.mark.parametrize(
    "kind", [Chosen, Columns, Three, Sorted, Unweighted, Mask, Stacked, OtherWeights, Repeated]
)
def test_experts_choose_tokens(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    compiled = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    program = compiled.pass_results[-1].program
    for rows in (3, 33) if kind is Three else (1, 2, 33):
        x = torch.randn(rows, D)
        with torch.no_grad():
            (y,) = evaluate(program.graph, [x], program.weights)
            torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-6)
    forms = {Stacked: ["each expert for its own rows"], OtherWeights: [], Repeated: []}
    assert [block.form for block in compiled.blocks] == forms.get(kind, [SOME])
    if kind is OtherWeights:
        (reason, *_) = (d.reason for d in compiled.declined)
        assert "experts choose their tokens: aten.topk.default chooses among T of them" in reason


def test_code_of_chosen_tokens() -> None:
    torch.manual_seed(0)
    module = Chosen().eval()
    compiled = moec.compile(module, (torch.randn(6, D),))
    for rows in (1, 5, 40):
        x = torch.randn(rows, D)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)
