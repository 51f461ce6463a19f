"""Dispatch in common forms that read counts, sizes and lists into Python.

Each function maps a `Layer` and x [B, S, D] to y [B, S, D]: top-2 of four experts, in the form that
its docstring names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture.speculate.layer import D, E, K, Layer

# ---- counts read into Python; experts without rows are skipped -------------------------


def counts_as_a_list(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    counts = torch.bincount(ids.flatten(), minlength=E).tolist()
    out = torch.zeros_like(flat)
    for i in range(E):
        if counts[i] == 0:
            continue
        token, slot = torch.where(ids == i)
        out[token] += layer.experts[i](flat[token]) * weights[token, slot, None]
    return out.view(x.shape)


def a_count_as_a_truth(layer: Layer, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    weights, ids = layer.choose(flat)
    out = flat.new_zeros(flat.shape)
    for i, expert in enumerate(layer.experts):
        hit = ids == i
        if not hit.sum().item():
            continue
        token, slot = hit.nonzero(as_tuple=True)
        out.index_add_(0, token, expert(flat[token]) * weights[token, slot].unsqueeze(-1))
    return out.unflatten(0, x.shape[:2])


def a_mask_that_is_set(layer: Layer, x: Tensor) -> Tensor:
    flat = x.view(-1, D)
    weights, ids = layer.choose(flat)
    out = torch.zeros_like(flat)
    for i in range(E):
        mask = (ids == i).any(-1)
        if mask.any():
            share = (weights * (ids == i)).sum(-1, keepdim=True)
            out[mask] += layer.experts[i](flat[mask]) * share[mask]
    return out.view_as(x)


def counts_of_a_one_hot(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    hot = F.one_hot(ids, E)
    counts = hot.sum((0, 1)).tolist()
    out = torch.zeros_like(flat)
    for i, count in enumerate(counts):
        if count > 0:
            token, slot = torch.where(hot[..., i] == 1)
            out.index_add_(0, token, layer.experts[i](flat[token]) * weights[token, slot, None])
    return out.view_as(x)


def the_experts_that_were_hit(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    out = torch.zeros_like(flat)
    for expert in torch.unique(ids).tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        out[token] += layer.experts[expert](flat[token]) * weights[token, slot, None]
    return out.view_as(x)


def unique_without_lists(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    ids, order = ids.sort(-1)
    weights, out = weights.gather(-1, order), torch.zeros_like(flat)
    for index in ids.unique():
        token, slot = torch.where(ids == index)
        out[token] += layer.experts[index.item()](flat[token]) * weights[token, slot, None]
    return out.view_as(x)


def nonzero_counts(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    busy = torch.bincount(ids.flatten(), minlength=E).nonzero().flatten()
    out = torch.zeros_like(flat)
    for i in busy:
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, layer.experts[int(i)](flat[token]) * weights[token, slot, None])
    return out.view_as(x)


def hits_as_rows(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    mask = F.one_hot(ids, E).permute(2, 1, 0)
    out = torch.zeros_like(flat)
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[hit].squeeze(0))
        out.index_add_(0, token, layer.experts[hit[0]](flat[token]) * weights[token, slot, None])
    return out.view_as(x)


# ---- rows sorted by expert, and cut by counts ------------------------------------------


def numpy_ends(layer: Layer, x: Tensor) -> Tensor:
    flat = x.view(-1, D)
    weights, ids = layer.choose(flat)
    order = ids.view(-1).argsort()
    ends = ids.view(-1).bincount().cpu().numpy().cumsum(0)
    token = order // K
    out = torch.zeros_like(flat)
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        if start == end:
            continue
        rows = token[start:end]
        y = layer.experts[i](flat[rows]).mul_(weights.view(-1, 1)[order[start:end]])
        out.scatter_reduce_(0, rows.view(-1, 1).repeat(1, D), y, reduce="sum")
    return out.view_as(x)


def numpy_starts(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    order = torch.argsort(ids.flatten(), stable=True)
    counts = torch.bincount(ids.flatten(), minlength=E).numpy()
    starts = np.concatenate([[0], np.cumsum(counts)])
    out = torch.zeros_like(flat)
    for i in range(E):
        if counts[i] > 0:
            rows = order[starts[i] : starts[i + 1]]
            y = layer.experts[i](flat[rows // K]) * weights.flatten()[rows, None]
            out.index_add_(0, rows // K, y)
    return out.view_as(x)


def ends_on_the_tensor(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    order = ids.flatten().argsort()
    ends = torch.bincount(ids.flatten(), minlength=E).cumsum(0).tolist()
    out, start = torch.zeros_like(flat), 0
    for expert, end in zip(layer.experts, ends, strict=True):
        if end == start:
            continue
        rows = order[start:end]
        token = rows // K
        out.index_add_(0, token, expert(flat[token]) * weights.flatten()[rows, None])
        start = end
    return out.view_as(x)


def split_and_cat(layer: Layer, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    weights, ids = layer.choose(flat)
    values, order = ids.flatten().sort(stable=True)
    counts = (values[:, None] == torch.arange(E)).sum(0)
    parts = flat[order // K].split(counts.tolist(), dim=0)
    ys = torch.cat([layer.experts[i](part) for i, part in enumerate(parts)])
    back = torch.empty_like(ys)
    back[order] = ys
    return (back.view(-1, K, D) * weights[..., None]).sum(1).view_as(x)


def split_without_the_empty(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    order = ids.flatten().argsort()
    sizes = torch.bincount(ids.flatten(), minlength=E).tolist()
    results = []
    for i, part in enumerate(torch.split(flat[order // K], sizes)):
        if part.shape[0] == 0:
            continue
        results.append(layer.experts[i](part))
    y = torch.cat(results) * weights.flatten()[order, None]
    return torch.zeros_like(flat).index_add_(0, order // K, y).view_as(x)


def a_buffer_in_pieces(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    order = ids.flatten().argsort()
    rows = flat[order // K]
    y, start = torch.empty_like(rows), 0
    for i, count in enumerate(torch.bincount(ids.flatten(), minlength=E).tolist()):
        y[start : start + count] = layer.experts[i](rows[start : start + count])
        start += count
    y = y * weights.flatten()[order, None]
    return torch.zeros_like(flat).index_add(0, order // K, y).view_as(x)


class Grouped(torch.autograd.Function):
    """Rows times the matrix of their expert, products written where they belong."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
        sizes = counts.tolist()
        out = rows.new_empty(rows.shape[0], weight.shape[2])
        start = 0
        ctx.save_for_backward(rows, counts)
        for i, part in enumerate(rows.split(sizes)):
            torch.mm(part, weight[i], out=out[start : start + sizes[i]])
            start += sizes[i]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def a_function_of_its_own(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    order = ids.flatten().argsort()
    counts = ids.flatten().bincount(minlength=E)
    h = torch.relu(Grouped.apply(flat[order // K], counts, layer.w1))
    y = Grouped.apply(h, counts, layer.w2) * weights.flatten()[order, None]
    return torch.zeros_like(flat).index_add(0, order // K, y).view_as(x)


class GroupedPieces(torch.autograd.Function):
    """As Grouped, with two splits by one list that is read twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty((rows.size(0), weight.size(2)))
        parts = rows.split(counts.tolist(), dim=0)
        for i, piece in enumerate(out.split(counts.tolist(), dim=0)):
            torch.mm(parts[i], weight[i], out=piece)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def pieces_of_two_splits(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    gates = torch.zeros(flat.shape[0], E).scatter(1, ids, weights)
    slots = weights.flatten().nonzero().squeeze(-1)
    order = slots[ids.flatten()[slots].sort(0)[1]]
    token, counts = order.div(K, rounding_mode="trunc"), (gates > 0).long().sum(0)
    h = torch.relu(GroupedPieces.apply(flat[token], counts, layer.w1))
    y = GroupedPieces.apply(h, counts, layer.w2) * weights.flatten()[order, None]
    return torch.zeros_like(flat).index_add(0, token, y).view_as(x)


def counts_of_sorted_ids(layer: Layer, x: Tensor) -> Tensor:
    """The best of one more are kept, as after a noisy gate."""
    flat = x.reshape(-1, D)
    top, ids = layer.gate(flat).topk(K + 1, -1)
    weights, ids = top[:, :K].softmax(-1), ids[:, :K]
    values, order = ids.flatten().sort(0)
    counts = torch.bincount(values, minlength=E).tolist()
    token = order.div(K, rounding_mode="floor")
    parts = flat.index_select(0, token).split(counts)
    ys = [layer.experts[i](parts[i]) for i in range(E) if parts[i].shape[0] > 0]
    y = torch.cat(ys) * weights.flatten()[order, None]
    return torch.zeros_like(flat).index_add(0, token, y).view_as(x)


def lengths_in_a_tensor(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    p, ids = layer.gate(flat).softmax(-1).max(-1)
    rows = [(ids == i).nonzero(as_tuple=True)[0] for i in range(E)]
    counts = flat.new_tensor([len(each) for each in rows])
    out = torch.zeros_like(flat)
    for i in range(E):
        out[rows[i]] = layer.experts[i](flat[rows[i]])
    return (out * p[:, None] + counts.mean() + torch.tensor([len(rows[0]), 1])[0]).view_as(x)


def lists_of_rows(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    mask = F.one_hot(ids, E).permute(2, 1, 0)
    out = torch.zeros_like(flat)
    for i in range(E):
        slot, token = torch.where(mask[i])
        if token.shape[0] == 0:
            continue
        tokens, slots = token.tolist(), slot.tolist()
        y = layer.experts[i](flat[None, tokens].reshape(-1, D)) * weights[tokens, slots, None]
        out.index_add_(0, token, y)
    return out.view_as(x)


def a_list_that_is_empty(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    out = torch.zeros_like(flat)
    for i in range(E):
        token, slot = torch.where(ids == i)
        tokens = token.tolist()
        if not tokens:
            continue
        y = layer.experts[i](flat[tokens]) * weights[token, slot, None]
        out.index_add_(0, torch.tensor(tokens), y)
    return out.view_as(x)


# ---- what eval mode leaves -------------------------------------------------------------


def noise_of_no_size(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    scale = 1.0 if layer.training else 0.0
    return layer.dense(flat + torch.randn_like(flat) * scale).view_as(x)


def noise_scaled_from_the_left(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    jitter = 0.0 * torch.empty_like(flat).uniform_(-1, 1)
    return layer.dense(flat + jitter).view_as(x)


def a_batch_norm(layer: Layer, x: Tensor) -> Tensor:
    return layer.dense(layer.norm(x.reshape(-1, D))).view_as(x)


def masks_that_are_cast(layer: Layer, x: Tensor) -> Tensor:
    """x.bool() and x.int() cast tensors where bool(x) and int(x) read numbers."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    chosen = F.one_hot(ids, E).int().bool()
    out = torch.zeros_like(flat)
    for i, expert in enumerate(layer.experts):
        mask = chosen[:, :, i].any(-1)
        if mask.any():
            share = (weights * chosen[:, :, i]).sum(-1)
            out[mask] += expert(flat[mask]) * share[mask, None]
    return out.view_as(x)


def a_number_by_a_mask(layer: Layer, x: Tensor) -> Tensor:
    y = layer.dense(x.reshape(-1, D)).relu()
    y[y == 0] = 1e-9
    return y.log().view_as(x)
