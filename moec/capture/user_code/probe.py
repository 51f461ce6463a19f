"""A module that uses every hook of `moec.capture.speculate`, to test torch's calls of them."""

from __future__ import annotations

import math

import torch


class SpeculationProbe(torch.nn.Module):
    """Has counts from tolist, a branch on a count, slices between counts, a capacity computed in
    floats, and a custom autograd function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = x.argmax(-1)
        order = ids.argsort()
        limit = max(math.ceil(x.shape[0] * 0.5), 1)
        y, start = torch.zeros_like(x), 0
        for count in torch.bincount(ids, minlength=int(x.shape[1])).tolist():
            if count == 0:
                continue
            rows = order[start : start + count]
            start += count
            doubled = Doubled.apply(x[rows])  # type: ignore[no-untyped-call]
            y.index_add_(0, rows, doubled)
        return y * (torch.arange(x.shape[0]) < limit)[:, None]


class Doubled(torch.autograd.Function):
    """x * 2."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 2
