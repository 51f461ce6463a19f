"""Sparse forms of the examples' layers that evaluate every expert on every row.

Seven examples have such a layer, as in the authors' code (M3-JEPA), or as a loop with masks where
no code was found. A comparison with it counts the avoided work, up to E / k times, and little else.
So latency.py also runs the form here, which an author who minds the cost would write in eager
PyTorch: a loop over the experts that reads the rows of each with `where` and adds its results with
`index_add_`. Router and weights are those of the example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Form = Callable[..., Tensor]
"""A layer of an example and its inputs -> the results of its `forward` in evaluation."""


def dispatch(experts: Iterable[nn.Module], rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """rows [T, .., D], ids [T, k], weights [T, k] -> [T, .., D]: the sum over the k choices of
    weight * expert(row). An id that is the number of experts is a choice of none."""
    y = torch.zeros_like(rows)
    for number, expert in enumerate(experts):
        tokens, slots = torch.where(ids == number)
        scales = weights[tokens, slots].view(-1, *[1] * (rows.dim() - 1))
        y.index_add_(0, tokens, expert(rows[tokens]) * scales)
    return y


def se_moe(layer: Any, x: Tensor) -> Tensor:
    """Without the capacity, which no expert reaches in evaluation: 2.4 T of T rows."""
    ids, weights, _ = layer.gate(layer.router(x))
    return dispatch(layer.experts, x, ids, weights)


def renormalised(layer: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    weights, ids = layer.gate(tokens).softmax(-1).topk(layer.top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return dispatch(layer.experts, tokens, ids, weights).reshape(x.shape)


def m3_jepa(layer: Any, h: Tensor) -> Tensor:
    weights, ids = layer.gate(h).softmax(-1).topk(layer.top_k, dim=-1)
    return F.gelu(layer.norm(dispatch(layer.experts, h, ids, weights))) + h


def raphael(layer: Any, h: Tensor, text: Tensor, attention: Tensor) -> Tensor:
    """A row of the dispatch is the region of one word, [N, W]."""
    route = layer.gate(text).softmax(-1).argmax(-1)
    region = (attention >= layer.alpha * attention.amax(-1, keepdim=True)).to(h.dtype)
    masked = (h[:, None] * region[..., None]).flatten(0, 1)
    ids = route.flatten()[:, None]
    each = dispatch(layer.experts, masked, ids, torch.ones_like(ids, dtype=h.dtype))
    return each.unflatten(0, route.shape).mean(1)


def zcode_m3(layer: Any, x: Tensor, priority: Tensor) -> Tensor:
    """The random token selection of the example; tokens beyond the capacity have no expert."""
    weight, chosen = layer.gate(x.float()).softmax(-1).max(-1)
    size, count = layer.capacity(x.shape[0]), len(layer.experts)
    mask = F.one_hot(chosen, count)
    first = (mask * priority).topk(size, dim=0).indices
    mask = mask * torch.zeros_like(mask).scatter(0, first, 1)
    ids = torch.where(mask.sum(-1) > 0, chosen, count)
    return dispatch(layer.experts, x, ids[:, None], weight[:, None])


def best(layer: Any, x: Tensor) -> Tensor:
    weight, chosen = layer.gate(x).softmax(-1).max(-1)
    return dispatch(layer.experts, x, chosen[:, None], weight[:, None])


def fastdit_3d(layer: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    weights, ids = layer.gate(tokens).softmax(-1).topk(layer.top_k, dim=-1)
    return dispatch(layer.experts, tokens, ids, weights).reshape(x.shape)


FORMS: dict[str, tuple[str, Form]] = {
    "09_se_moe": ("Experts", se_moe),
    "10_multimodal_generative": ("Sparse", renormalised),
    "11_m3_jepa": ("Experts", m3_jepa),
    "12_raphael": ("SpaceMoE", raphael),
    "14_zcode_m3": ("Switch", zcode_m3),
    "15_gemini_to_qstar": ("Sparse", best),
    "16_fastdit_3d": ("SparseFFN", fastdit_3d),
}
"""The class of the dense layer in each example of examples/systems/ that has one, and its form."""


def sparse(name: str, module: nn.Module) -> nn.Module | None:
    """A copy of an example's module that shares its weights and has sparse layers; None if the
    example has no dense layer."""
    if name not in FORMS:
        return None
    layer, form = FORMS[name]
    copied = copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})
    for part in copied.modules():
        if type(part).__name__ == layer:
            part.forward = partial(form, part)
    return copied
