"""Dispatch that repairs scores before it chooses.

Each function maps a `Layer` and x [B, S, D] to y [B, S, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.capture.speculate.layer import D, Layer


def scores_made_finite(layer: Layer, x: Tensor) -> Tensor:
    """XMoE: scores that are not finite become the smallest of the others. No drawn input has any,
    so the branch is proved on rows of NaN."""
    flat = x.reshape(-1, D)
    scores = layer.gate(flat)
    finite = scores.isfinite()
    if not finite.all():
        scores[~finite] = scores[finite].min()
    weights, ids = scores.softmax(-1).max(-1)
    out = torch.zeros_like(flat)
    for e, expert in enumerate(layer.experts):
        rows = torch.where(ids == e)[0]
        out[rows] = expert(flat[rows]) * weights[rows, None]
    return out.view_as(x)
