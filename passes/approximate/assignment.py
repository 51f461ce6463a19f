"""The assignment problem: assigns each row a different column so that the sum of gains is
greatest."""

from __future__ import annotations

import torch


def assign(gain: torch.Tensor) -> torch.Tensor:
    """The permutation p, i64[N], with the greatest sum of gain[i, p[i]]; gain is [N, N]."""
    from scipy.optimize import linear_sum_assignment  # takes long, and few compilations need it

    _, columns = linear_sum_assignment(gain.double().numpy(), maximize=True)
    return torch.from_numpy(columns)
