"""Weights [T, E] in bfloat16 are floats: they are no one-hot mask, as integers and booleans may
be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate

D, E = 8, 4


class AllExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.w1 = nn.Parameter(torch.randn(E, D, D) * 0.3)
        self.w2 = nn.Parameter(torch.randn(E, D, D) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        ids = torch.arange(E).expand(x.shape[0], -1)
        full = x.new_zeros(x.shape[0], E).scatter(1, ids, weights)
        y = torch.bmm(torch.bmm(x.expand(E, -1, -1), self.w1).relu(), self.w2)
        return (y * full.t()[..., None]).sum(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers(dtype: torch.dtype) -> None:
    """The bound is two units in the last place of a sum of E rounded products."""
    torch.manual_seed(0)
    module, x = AllExperts().eval().to(dtype), torch.randn(9, D, dtype=dtype)
    program = moec.compile(module, (x,), build=False).pass_results[-1].program
    (y,) = evaluate(program.graph, [x], program.weights)
    with torch.no_grad():
        right = module(x)
    bound = 2 * torch.finfo(dtype).eps * float(right.abs().max())
    assert float((y - right).abs().max()) <= bound


class Counted(nn.Module):
    """Each sequence has a mask or a count of each expert in place of weights."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.experts, self.counts = nn.ModuleList(nn.Linear(D, D) for _ in range(2)), counts

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = (ids == number).long() + (ids > number) if self.counts else ids >= number
            y = y + expert(x) * weight[:, None, None]
        return y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [False, True])
def test_masks_and_counts_as_weights(counts: bool, dtype: torch.dtype) -> None:
    """Kernels have no rows of bool or of whole numbers to multiply by."""
    torch.manual_seed(0)
    module, x = Counted(counts).eval().to(dtype), torch.randn(2, 5, D, dtype=dtype)
    compiled = moec.compile(module, (x, torch.tensor([1, 0])))
    assert [block.top_k for block in compiled.blocks] == [2]
    assert compiled(x[:1], torch.tensor([-3])).abs().max() == 0
