"""Gates that a threshold opens, any number of them for each token (DynMoE, arXiv 2405.14297): each
expert reads the tokens for which its weight is not zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.interpret.evaluate import evaluate
from moec.ir.text import print_graph

D, E = 8, 4


class TopAny(nn.Module):
    """Experts whose similarity exceeds their threshold; the most similar one where none does."""

    def __init__(self) -> None:
        super().__init__()
        self.similarity = nn.Parameter(torch.randn(D, E))
        self.thresholds = nn.Parameter(torch.zeros(E))
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(F.normalize(x, dim=1) @ F.normalize(self.similarity, dim=0))
        active = (scores > torch.sigmoid(self.thresholds)).to(x.dtype)
        none = active.sum(1, keepdim=True) == 0
        active = torch.where(none, F.one_hot(scores.argmax(1), E).to(x.dtype), active)
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return (active[..., None] * y).sum(1) / active.sum(1, keepdim=True)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return TopAny().eval()


@pytest.fixture(scope="module")
def compiled(module: nn.Module) -> moec.CompiledModel:
    return moec.compile(module, (torch.randn(6, D),), build=False)


def test_one_block_without_rows_of_closed_gates(compiled: moec.CompiledModel) -> None:
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, E)]
    texts = [print_graph(result.program.graph) for result in compiled.pass_results]
    assert any('form="experts whose weight is not zero"' in text for text in texts)


@pytest.mark.parametrize("rows", [1, 17, 64])
def test_numbers(compiled: moec.CompiledModel, module: nn.Module, rows: int) -> None:
    """64 rows contain some for which no gate is open."""
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(rows))
    program = compiled.pass_results[-1].program
    (y,) = evaluate(program.graph, [x], program.weights)
    with torch.no_grad():
        torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-6)
