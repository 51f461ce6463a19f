"""Dispatch in common forms that keep the ends and starts of sorted rows in tensors.

Each function maps a `Layer` and x [B, S, D] to y [B, S, D]: top-2 of four experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture.speculate.layer import D, E, K, Layer


def _sorted(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in the order of their experts, that order, the ids as they were, and the weights."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    order = ids.flatten().argsort(stable=True)
    return flat[order // K], order, ids.flatten(), weights.flatten()[order, None]


def _back(y: Tensor, order: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(x.reshape(-1, D))
    return out.index_add(0, order // K, y * weights).view_as(x)


def an_end_at_a_time(layer: Layer, x: Tensor) -> Tensor:
    rows, order, ids, weights = _sorted(layer, x)
    ends = ids.bincount(minlength=E).cumsum(-1)
    y, before = torch.empty_like(rows), 0
    for e in range(E):
        end = int(ends[e])
        if end > before:
            y[before:end] = layer.experts[e](rows[before:end])
        before = end
    return _back(y, order, weights, x)


def slices_between_tensors(layer: Layer, x: Tensor) -> Tensor:
    rows, order, ids, weights = _sorted(layer, x)
    counts = torch.histc(ids.float(), bins=E, min=0, max=E - 1).to(torch.long)
    ends = torch.cat((torch.zeros(1, dtype=torch.long), torch.cumsum(counts, 0)))
    y = torch.zeros_like(rows)
    for e in range(E):
        a, b = ends[e], ends[e + 1]
        y[a:b] = layer.experts[e](rows[a:b])
    back = torch.zeros_like(y)
    back.index_copy_(0, order, y * weights)
    return back.view(-1, K, D).sum(1).view_as(x)


def marks_that_are_counted(layer: Layer, x: Tensor) -> Tensor:
    """Inference of DeepSeek V2 and V3: the counts are sums of a table in which each token marks its
    experts, and the rows return in a new tensor as long as all pieces."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    marks = ids.new_zeros((ids.shape[0], E))
    marks.scatter_(1, ids, 1)
    counts = marks.sum(dim=0)
    order = ids.view(-1).argsort()
    rows, counts = flat[order // ids.shape[1]], counts.cpu().numpy()
    parts, start = [], 0
    for e, count in enumerate(counts):
        end = start + count
        if count == 0:
            continue
        parts.append(layer.experts[e](rows[start:end]))
        start = end
    y = torch.cat(parts, dim=0) if len(parts) else rows.new_empty(0)
    back = torch.empty_like(y)
    back[order] = y
    return (back.view(*ids.shape, -1) * weights.unsqueeze(dim=-1)).sum(dim=1).view_as(x)


def padded_ends(layer: Layer, x: Tensor) -> Tensor:
    rows, order, ids, weights = _sorted(layer, x)
    offsets = F.pad(F.one_hot(ids.view(-1, K), E).sum(1).sum(0).cumsum(0), (1, 0))
    parts = []
    for e, expert in enumerate(layer.experts):
        if offsets[e + 1] == offsets[e]:
            continue
        parts.append(expert(rows[offsets[e] : offsets[e + 1]]))
    return _back(torch.cat(parts), order, weights, x)


def ends_written_behind_a_zero(layer: Layer, x: Tensor) -> Tensor:
    rows, order, ids, weights = _sorted(layer, x)
    offsets = torch.zeros(E + 1, dtype=torch.int64)
    offsets[1:] = torch.cumsum(torch.bincount(ids, minlength=E), 0)
    parts = []
    for e in range(E):
        if offsets[e] < offsets[e + 1]:
            parts.append(layer.experts[e](rows[offsets[e].item() : offsets[e + 1].item()]))
    return _back(torch.cat(parts), order, weights, x)


def starts_as_a_difference(layer: Layer, x: Tensor) -> Tensor:
    rows, order, ids, weights = _sorted(layer, x)
    counts = torch.bincount(ids, minlength=E)
    starts = counts.cumsum(0) - counts
    out = torch.zeros_like(x.reshape(-1, D))
    for e, (start, count) in enumerate(zip(starts.tolist(), counts, strict=True)):
        if count == 0:
            continue
        part = rows.narrow(0, start, count.item())
        at = order[start : start + count]
        out.index_add_(0, at // K, layer.experts[e](part) * weights[start : start + count])
    return out.view_as(x)


def numpy_counts_of_a_histogram(layer: Layer, x: Tensor) -> Tensor:
    rows, order, ids, weights = _sorted(layer, x)
    counts = torch.histc(ids.float(), E, 0, E - 1).int()
    parts, start = [], 0
    for e, count in enumerate(counts.cpu().numpy()):
        if count == 0:
            continue
        parts.append(layer.experts[e](rows[start : start + count]))
        start += count
    y = torch.cat(parts)
    back = torch.zeros_like(y)
    back[order] = y * weights
    return back.view(-1, K, D).sum(1).view_as(x)


def selects_of_copies(layer: Layer, x: Tensor) -> Tensor:
    """LLaMA-MoE's form: copies of row numbers, and index_select for rows and weights."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    copies = torch.arange(flat.shape[0]).repeat_interleave(K)
    order = ids.flatten().sort(0)[1]
    token = copies.index_select(0, order)
    parts = flat.index_select(0, token).split(ids.flatten().bincount(minlength=E).tolist())
    y = torch.cat([e(p) for e, p in zip(layer.experts, parts, strict=True) if p.shape[0] > 0])
    y = y * weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(flat).index_add(0, token, y).view_as(x)


def cut_at_ends(layer: Layer, x: Tensor) -> Tensor:
    rows, order, ids, weights = _sorted(layer, x)
    ends = torch.bincount(ids, minlength=E).cumsum(0)
    parts = torch.tensor_split(rows, ends[:-1])
    y = torch.cat([expert(part) for expert, part in zip(layer.experts, parts, strict=True)])
    return _back(y, order, weights, x)


def two_products_on_sorted_rows(layer: Layer, x: Tensor) -> Tensor:
    """ScatterMoE without kernels: rows stay sorted from the first product to the second."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    _, order = ids.flatten().sort()
    ends = ids.flatten().bincount(minlength=E).cumsum(-1)

    def product(rows: Tensor, stack: Tensor) -> Tensor:
        y, start = rows.new_empty(rows.size(0), stack.size(2)), 0
        for e in range(E):
            y[start : ends[e]] = rows[start : ends[e]] @ stack[e]
            start = ends[e]
        return y

    y = product(F.silu(product(flat[order // K], layer.w1)), layer.w2)
    out = torch.empty_like(y)
    out[order] = y
    return torch.bmm(weights[:, None], out.view(-1, K, D)).squeeze(1).view_as(x)


def rows_padded_by_none(layer: Layer, x: Tensor) -> Tensor:
    """torchtitan's loop: the rows before a padding that is there for other kernels, and the padding
    behind the results; weights scale what the experts read."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    order = ids.flatten().argsort(stable=True)
    index = (order // K).reshape(-1, 1).expand(-1, D)
    rows = flat.gather(0, index) * weights.flatten()[order].reshape(-1, 1)
    counts = torch.histc(ids.flatten().float(), bins=E, min=0, max=E).int().tolist()
    padding = rows.shape[0] - sum(counts)
    parts = rows[: sum(counts)].split(counts)
    y = torch.cat([expert(part) for expert, part in zip(layer.experts, parts, strict=True)])
    y = torch.vstack((y, y.new_zeros((padding, D))))
    return torch.zeros_like(flat).scatter_add(0, index, y).view_as(x)


def chunks_in_an_order(layer: Layer, x: Tensor) -> Tensor:
    """Megatron-Core's chunks, which an all-to-all would put in another order: on one rank the order
    is that of a range, which Python reads from a tensor."""
    rows, order, ids, weights = _sorted(layer, x)
    counts = torch.bincount(ids, minlength=E).tolist()
    chunks = rows.split(counts)
    rows = torch.cat([chunks[i] for i in torch.arange(E).tolist()])
    y = torch.cat([expert(p) for expert, p in zip(layer.experts, rows.split(counts), strict=True)])
    return _back(y, order, weights, x)


def rows_of_the_total(layer: Layer, x: Tensor) -> Tensor:
    """fastmoe: the sum of all counts is read, and as many rows are taken and written."""
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    counts = torch.bincount(ids.flatten(), minlength=E)
    total = int(counts.sum().item())
    order = torch.argsort(ids.flatten(), stable=True)
    rows, start, parts = flat.index_select(0, order[:total] // K), 0, []
    for i in range(E):
        count = int(counts[i].item())
        parts.append(layer.experts[i](rows[start : start + count]))
        start += count
    out = flat.new_zeros(total, D).index_copy(0, order, torch.cat(parts))
    return torch.bmm(weights[:, None], out.view(-1, K, D)).view(x.shape)


def a_buffer_of_the_total(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    order = ids.flatten().argsort(stable=True)
    counts, start = torch.bincount(ids.flatten(), minlength=E), 0
    rows, out = flat[order // K], flat.new_empty(int(counts.sum()), D)
    for i, count in enumerate(counts.tolist()):
        out[start : start + count] = layer.experts[i](rows[start : start + count])
        start += count
    back = torch.zeros_like(out)
    back[order] = out
    return (back.view(-1, K, D) * weights[..., None]).sum(1).view(x.shape)
