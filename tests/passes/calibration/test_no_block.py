"""Measured passes on experts that are in no block."""

from __future__ import annotations

import torch
from torch import nn

import moec
from moec.passes.approximate.prune_experts import PruneExperts
from tests.capture.modules import WIDTH


class OneExpert(nn.Module):
    """One expert is no mixture, and data decide how many rows it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.where(x[:, 0] > 0)[0]
        return torch.zeros_like(x).index_add(0, rows, self.expert(x[rows]))


def test_rows_that_data_decide_are_counted_without_a_block() -> None:
    x = torch.randn(64, WIDTH)
    compiled = moec.compile(
        OneExpert(),
        (x[:5],),
        passes=[PruneExperts(keep=0.5)],
        calib={"x": x},
        build=False,
        stop_after="prune-experts",
    )
    (damage,) = compiled.report().damage
    assert damage.flops_before == damage.flops_after == 2 * WIDTH * WIDTH
    assert any("prune-experts changed nothing" in note for note in compiled.report().notes)
