"""Dispatch with a routing map, a boolean table [T, E], or with masks of the rows that are kept.

Each function maps a `Layer` and x [B, S, D] to y [B, S, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture.speculate.layer import D, E, K, Layer


def _mapped(layer: Layer, flat: Tensor) -> tuple[Tensor, Tensor]:
    """The weights [T, E], zero where an expert is not chosen, and the map [T, E]."""
    weights, ids = layer.choose(flat)
    full = torch.zeros(flat.shape[0], E)
    return full.scatter(1, ids, weights), full.int().scatter(1, ids, 1).bool()


def _dispatched(layer: Layer, x: Tensor, flat: Tensor, weights: Tensor, routed: Tensor) -> Tensor:
    tokens = flat.shape[0]
    numbers = torch.arange(tokens).unsqueeze(0).expand(E, -1)
    order = numbers.masked_select(routed.T.contiguous())
    parts = flat.index_select(0, order).split(routed.sum(dim=0).tolist())
    y = torch.cat([expert(part) for expert, part in zip(layer.experts, parts, strict=True)])
    y = y * weights.T.contiguous().masked_select(routed.T.contiguous())[:, None]
    out = torch.zeros_like(flat)
    out.scatter_add_(0, order[:, None].expand(-1, D), y)
    return out.view_as(x)


def rows_that_a_map_selects(layer: Layer, x: Tensor) -> Tensor:
    """Megatron-Core's permutation: no list of choices, only the map and its transpose."""
    flat = x.reshape(-1, D)
    return _dispatched(layer, x, flat, *_mapped(layer, flat))


def a_map_that_a_capacity_cuts(layer: Layer, x: Tensor) -> Tensor:
    """An expert keeps the two tokens of the greatest weights, or the one."""
    flat = x.reshape(-1, D)
    weights, routed = _mapped(layer, flat)
    best = weights.topk(min(2, flat.shape[0]), dim=0)[1]
    routed = routed & torch.zeros(flat.shape[0], E).scatter(0, best, 1).bool()
    return _dispatched(layer, x, flat, weights * routed, routed)


def a_map_that_is_written(layer: Layer, x: Tensor) -> Tensor:
    """The map is not the same before and after it is written."""
    flat = x.reshape(-1, D)
    weights, routed = _mapped(layer, flat)
    before = weights.T.masked_select(routed.T).sum()
    routed.logical_and_(routed.cumsum(0) <= 1)
    return _dispatched(layer, x, flat, weights, routed) + before


def ids_that_are_turned(layer: Layer, x: Tensor) -> Tensor:
    """All first choices, then all second ones: the property T is no call that has a name."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    turned = ids.T.flatten()
    order = turned.argsort(stable=True)
    parts = flat[order % flat.shape[0]].split(turned.bincount(minlength=1).tolist())
    y = torch.cat([expert(part) for expert, part in zip(layer.experts, parts, strict=False)])
    y = y * weights.T.flatten()[order, None]
    return torch.zeros_like(flat).index_add(0, order % flat.shape[0], y).view_as(x)


def values_of_a_row_mask(layer: Layer, x: Tensor) -> Tensor:
    """A mask with fewer axes than the values."""
    flat = x.reshape(-1, D)
    busy = layer.gate(flat).amax(-1, keepdim=True) > 0
    return layer.dense(flat).view_as(x) + flat.masked_select(busy).sum()


def slots_within_a_capacity(layer: Layer, x: Tensor) -> Tensor:
    """Tutel's slots: only the rows that are kept have a place in the buffer, and the numbers of the
    others are beyond its end. The capacity is a float times a quotient."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    capacity = int(0.75 * ((flat.shape[0] + E - 1) // E)) + 1
    hot = F.one_hot(ids.t().flatten(), E)
    positions = ((hot.cumsum(0) - 1) * hot).sum(-1).view(K, -1)
    rows = flat.new_zeros(E * capacity, D)
    for k in range(K):
        mask = positions[k] < capacity
        rows.index_add_(0, (ids[:, k] * capacity + positions[k])[mask], flat[mask])
    parts = rows.view(E, capacity, D)
    y = torch.stack([expert(part) for expert, part in zip(layer.experts, parts, strict=True)])
    y, out = y.view(-1, D), torch.zeros_like(flat)
    for k in range(K):
        mask = positions[k] < capacity
        at = (ids[:, k] * capacity + positions[k])[mask]
        out[mask] += y[at] * weights[mask, k, None]
    return out.view_as(x)
