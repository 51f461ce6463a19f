"""Dispatch with a capacity per expert, computed from floats or read from data.

Each function maps a `Layer` and x [B, S, D] to y [B, S, D].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture.speculate.layer import D, E, K, Layer


def _kept(layer: Layer, x: Tensor, capacity: Any) -> Tensor:
    flat = x.reshape(-1, D)
    p, ids = layer.gate(flat).softmax(-1).max(-1)
    mask = F.one_hot(ids, E)
    position = (mask.cumsum(0) - 1).gather(1, ids[:, None])[:, 0]
    selected = position < capacity
    out = torch.zeros_like(flat)
    for i, e in enumerate(layer.experts):
        m = (ids == i) & selected
        out[m] = e(flat[m]) * p[m, None]
    return out.view_as(x)


def capacity_of_a_float(layer: Layer, x: Tensor) -> Tensor:
    return _kept(layer, x, max(int(x.shape[0] * x.shape[1] * 1.25 / E), 4))


def capacity_rounded_up(layer: Layer, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D).shape[0]
    return _kept(layer, x, min(math.ceil(tokens / E * 1.5), tokens))


@torch.jit.script
def scripted_capacity(flat: torch.Tensor, experts: int, factor: float) -> torch.Tensor:
    return torch.ceil(torch.tensor(float(flat.shape[0]) / experts * factor)).to(torch.int64)


def capacity_of_a_script(layer: Layer, x: Tensor) -> Tensor:
    return _kept(layer, x, int(scripted_capacity(x.reshape(-1, D), E, 1.0)))


def capacity_compared(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    p, ids = layer.gate(flat).softmax(-1).max(-1)
    capacity = max(int(flat.shape[0] / E), 2)
    out = flat.clone()
    for i, e in enumerate(layer.experts):
        rows = (ids == i).nonzero(as_tuple=True)[0]
        if len(rows) > capacity:
            rows = rows[:capacity]
        out[rows] = e(flat[rows])
    return (out * p[:, None]).view_as(x)


def the_greatest_count(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    mask = F.one_hot(ids, E).sum(1)
    position = mask.cumsum(0) * mask - 1
    most = int(mask.sum(0).max().item())
    slots = F.one_hot(position.clamp(min=0), most) * mask[..., None]
    picked = torch.einsum("tec,td->ecd", slots.to(flat.dtype), flat)
    y = torch.bmm(F.relu(torch.bmm(picked, layer.w1)), layer.w2)
    full = torch.zeros(flat.shape[0], E).scatter(1, ids, weights)
    return torch.einsum("tec,te,ecd->td", slots.to(flat.dtype), full, y).view_as(x)


def as_many_classes_as_places(layer: Layer, x: Tensor) -> Tensor:
    """One-hot rows of the greatest place, cut to the capacity; a mask is written in place."""
    flat = x.reshape(-1, D)
    gates, ids = layer.choose(flat)
    capacity = max(int(flat.shape[0] * 2.0 / E), 2)
    mask, positions, before = F.one_hot(ids.t(), E).float(), [], torch.zeros(1, E)
    for i in range(K):
        position = (mask[i].cumsum(0) - mask[i] + before) * mask[i]
        mask[i] *= (position < float(capacity)).float()
        before = mask[i].sum(0, keepdim=True) + before
        positions.append((position * mask[i]).sum(-1))
    remaining = torch.stack(positions).long()
    hot = F.one_hot(remaining, max(int(remaining.max()) + 1, capacity))[..., :capacity].float()
    combine = (gates.t()[..., None, None] * mask[..., None] * hot[..., None, :]).sum(0)
    picked = torch.einsum("tec,td->ecd", (combine > 0).float(), flat)
    y = torch.bmm(F.relu(torch.bmm(picked, layer.w1)), layer.w2)
    return torch.einsum("tec,ecd->td", combine, y).view_as(x)


def classes_that_a_tensor_counts(layer: Layer, x: Tensor) -> Tensor:
    """The greatest place stays in a tensor, which Python's max compares with a size; the places
    come through a padding, after which nothing bounds them."""
    length = x.shape[1]
    p, ids = layer.gate(x).softmax(-1).max(-1)
    mask = F.one_hot(ids, E).float()
    position = (F.pad(mask, (0, 0, 1, 0)).cumsum(1)[:, :-1] * mask).sum(-1).long()
    capacity = max(min(length, int(length * 1.5 / E)), 2)
    hot = F.one_hot(position, max(position.max() + 1, capacity))[..., :capacity].float()
    combine = p[..., None, None] * mask[..., None] * hot[..., None, :]
    rows = torch.einsum("bnd,bnec->ebcd", x, (combine > 0).float())
    y = torch.stack([expert(part) for expert, part in zip(layer.experts, rows, strict=True)])
    return torch.einsum("ebcd,bnec->bnd", y, combine)
