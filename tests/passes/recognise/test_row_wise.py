"""Experts that read their other rows, or how many they have: declined, with the line and why."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moec

RULE = "and an expert must compute each row by itself"


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)


class Shared(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) / x.shape[0]


class Scaled(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) / math.sqrt(x.shape[0])


class Positions(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) + torch.arange(len(x))[:, None]


class Centred(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x - x.mean(0))


class Normed(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) / x.norm()


class Attending(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) + (x @ x.T).softmax(-1) @ x


class Turned(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.flip(0))


class Loop(nn.Module):
    def __init__(self, expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == number)
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return y


@pytest.mark.parametrize(
    ("expert", "words"),
    [
        (Shared, "aten.div.Tensor reads the number of rows (test_row_wise.py:"),
        (Scaled, "aten.full.default counts the rows (test_row_wise.py:"),
        (Positions, "aten.arange.start_step counts the rows (test_row_wise.py:"),
        (Centred, "aten.mean.dim reduces over rows (test_row_wise.py:"),
        (Normed, "aten.linalg_vector_norm.default reduces over all axes (test_row_wise.py:"),
        (Attending, "multiplies rows with rows (test_row_wise.py:"),
    ],
)
def test_the_reason_names_operator_and_line(expert: type[Expert], words: str) -> None:
    torch.manual_seed(0)
    compiled = moec.compile(Loop(expert).eval(), (torch.randn(12, 8),), build=False, verify=False)
    reason = compiled.declined[0].reason
    assert words in reason
    assert RULE in reason
    assert compiled.blocks == ()


def test_an_operator_that_moves_rows_is_named_with_its_line() -> None:
    compiled = moec.compile(Loop(Turned).eval(), (torch.randn(12, 8),), build=False, verify=False)
    assert "rows go through aten.flip.default" in compiled.declined[0].reason
    assert "`return self.up(x.flip(0))`" in compiled.declined[0].reason


class Beyond(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * (x.shape[0] > 3)


def test_a_body_that_reads_its_number_of_rows_is_no_expert() -> None:
    compiled = moec.compile(Loop(Beyond).eval(), (torch.randn(12, 8),), build=False, verify=False)
    assert compiled.blocks == ()
    assert "aten.full.default counts the rows" in compiled.declined[0].reason
