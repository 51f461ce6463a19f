"""Experts that gate their own rows by one number (BASE layers, arXiv 2103.16716, equation 4), and
blocks whose result is the model's output, in machine code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate

D, E = 8, 4


class Base(nn.Module):
    """Rows sorted by their nearest centroid; y = a * expert(x) + (1 - a) * x."""

    def __init__(self) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(E, D))
        self.experts = nn.ModuleList([nn.Linear(D, D, bias=False) for _ in range(E)])

    def scores(self, rows: Tensor, centroid: Tensor) -> Tensor:
        return rows.mv(centroid)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        nearest, order = (flat @ self.centroids.t()).topk(1, dim=1).indices.view(-1).sort()
        sizes = torch.zeros(E, dtype=torch.long)
        experts, counts = torch.unique_consecutive(nearest, return_counts=True)
        sizes[experts] = counts
        results = []
        for e, rows in enumerate(flat[order].split(sizes.tolist())):
            if rows.size(0) > 0:
                share = torch.sigmoid(self.scores(rows, self.centroids[e])).unsqueeze(1)
                rows = share * self.experts[e](rows) + (1 - share) * rows
            results.append(rows)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.size(0)))
        return torch.cat(results)[back].view(x.size())


class Matmul(Base):
    """The same product as a matmul with a matrix of one axis."""

    def scores(self, rows: Tensor, centroid: Tensor) -> Tensor:
        return rows @ centroid


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Base().eval()


@pytest.fixture(scope="module")
def compiled(module: nn.Module) -> moec.CompiledModel:
    return moec.compile(module, (torch.randn(2, 6, D),))


def test_one_block(compiled: moec.CompiledModel) -> None:
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, 1)]
    assert [value.name for value in compiled.graph.outputs] == ["output"]


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (2, 20)])
def test_numbers(compiled: moec.CompiledModel, module: nn.Module, size: tuple[int, int]) -> None:
    x = torch.randn(*size, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)


def test_a_product_with_a_vector() -> None:
    torch.manual_seed(0)
    module, x = Matmul().eval(), torch.randn(2, 6, D)
    compiled = moec.compile(module, (x,), build=False, verify=False)
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, 1)]
    program = compiled.pass_results[-1].program
    with torch.no_grad():
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-6)
