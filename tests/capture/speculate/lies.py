"""Modules that violate an assumption of the capture: each must be refused with the user's line."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture.speculate.layer import D, E, Layer


def adds_without_rows(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    counts = torch.bincount(ids.flatten(), minlength=E).tolist()
    out = torch.zeros_like(flat)
    for i in range(E):
        if counts[i] == 0:
            out = out + 0.1
            continue
        token, slot = torch.where(ids == i)
        out.index_add_(0, token, layer.experts[i](flat[token]) * weights[token, slot, None])
    return out.view_as(x)


def adds_without_rows_for_the_last(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    weights, ids = layer.choose(flat)
    out = torch.zeros_like(flat)
    for i, count in enumerate(torch.bincount(ids.flatten(), minlength=E).tolist()):
        if count == 0:
            out = out + (0.1 if i == E - 1 else 0.0)
        else:
            token, slot = torch.where(ids == i)
            out.index_add_(0, token, layer.experts[i](flat[token]) * weights[token, slot, None])
    return out.view_as(x)


def chooses_by_a_count(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    _, ids = layer.choose(flat)
    n = int((ids == 0).sum())
    if n > 7:
        return layer.experts[0](flat).view_as(x)
    return layer.experts[1](flat).view_as(x)


def binds_beyond_700_rows(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    p, ids = layer.gate(flat).softmax(-1).max(-1)
    out = torch.zeros_like(flat)
    for i, e in enumerate(layer.experts):
        rows = torch.where(ids == i)[0]
        scale = 1.0
        if rows.shape[0] > 700:
            scale = 0.5
        out[rows] = scale * e(flat[rows]) * p[rows, None]
    return out.view_as(x)


def binds_beyond_what_is_tried(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    p, ids = layer.gate(flat).softmax(-1).max(-1)
    out = torch.zeros_like(flat)
    for i, e in enumerate(layer.experts):
        rows = torch.where(ids == i)[0]
        if len(rows) > 100_000:
            rows = rows[:100_000]
        out[rows] = e(flat[rows]) * p[rows, None]
    return out.view_as(x)


def noise_that_matters(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    return layer.dense(flat + torch.randn_like(flat) * 0.5).view_as(x)


def noise_that_breaks_ties(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    logits = layer.gate(flat)
    ids = (logits + 1e-9 * torch.rand_like(logits)).argmax(-1)
    full = F.one_hot(ids, E).to(flat.dtype)
    y: Any = sum(full[:, i, None] * (e(flat) + i + 1) for i, e in enumerate(layer.experts))
    return y.view_as(x)


def dropout_that_stays(layer: Layer, x: Tensor) -> Tensor:
    return F.dropout(layer.dense(x.reshape(-1, D)), 0.2, training=True).view_as(x)


def divides_by_the_greatest_count(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    _, ids = layer.choose(flat)
    most = int(F.one_hot(ids, E).sum(1).sum(0).max().item())
    return (layer.dense(flat) / max(most, 1)).view_as(x)


def counts_the_experts_that_were_hit(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    _, ids = layer.choose(flat)
    return (layer.dense(flat) * len(ids.unique())).view_as(x)


def loops_over_rows(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    _, ids = layer.choose(flat)
    out = torch.zeros_like(flat)
    for token in torch.where(ids == 0)[0].tolist():
        out[token] = layer.experts[0](flat[token])
    return out.view_as(x)


def loops_until_it_converges(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    scores = layer.gate(flat).exp()
    error: Any = 1.0
    while error > 1e-4:
        before, scores = scores, scores / scores.sum(0)
        scores = scores / scores.sum(1, keepdim=True)
        error = (before - scores).abs().mean()
    return (layer.dense(flat) * scores.amax(-1, keepdim=True)).view_as(x)


def an_answer_outside_of_an_if(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    _, ids = layer.choose(flat)
    empty = not (ids == 0).any()
    return layer.experts[0](flat).view_as(x) * (1.0 if empty else 2.0)


def always_one_way(layer: Layer, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    if (flat.abs().sum(-1) >= 0).any():
        return layer.dense(flat).view_as(x)
    return x


LIES = {
    lie.__name__.replace("_", " "): lie
    for lie in (
        adds_without_rows,
        adds_without_rows_for_the_last,
        chooses_by_a_count,
        binds_beyond_700_rows,
        binds_beyond_what_is_tried,
        noise_that_matters,
        noise_that_breaks_ties,
        dropout_that_stays,
        divides_by_the_greatest_count,
        counts_the_experts_that_were_hit,
        loops_over_rows,
        loops_until_it_converges,
        an_answer_outside_of_an_if,
        always_one_way,
    )
}
