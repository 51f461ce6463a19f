"""Products for training on a GPU: PyTorch's grouped products, which read `ends` on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.dynamo.training.gradients import IN_PYTORCH, Products

_BYTES = 16  # of which rows, in the memory that is read, are a multiple (torch's own check)


class GroupedMm(Products):
    """Products by `torch.nn.functional.grouped_mm`, without waiting for a routing.

    It takes bfloat16 on a GPU; other dtypes, and rows that are no multiple of 16 bytes, are
    computed expert by expert.
    """

    def product(self, rows: Tensor, ends: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if not _takes(rows, w):
            return IN_PYTORCH.product(rows, ends, w, b)
        y = F.grouped_mm(rows, w.mT, offs=ends)
        if b is not None:
            y = y + b[_experts(ends, len(rows), len(w))]
        return _without_others(y, ends)

    def mixed(self, grad: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        if not _takes(grad, w):
            return IN_PYTORCH.mixed(grad, ends, w)
        return _without_others(F.grouped_mm(grad, w, offs=ends), ends)

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        if not _takes(rows, w):
            return IN_PYTORCH.outer(grad, rows, ends, w)
        if w.is_contiguous():
            return F.grouped_mm(grad.mT, rows, offs=ends)
        return F.grouped_mm(rows.mT, grad, offs=ends).mT


ON_GPU: Products = GroupedMm()


def _takes(rows: Tensor, w: Tensor) -> bool:
    multiple = all(size * w.element_size() % _BYTES == 0 for size in w.shape[1:])
    dense = w.is_contiguous() or w.mT.is_contiguous()
    return multiple and dense and len(rows) > 0 and rows.dtype == w.dtype == torch.bfloat16


def _experts(ends: Tensor, rows: int, experts: int) -> Tensor:
    """The expert of each row; of rows behind the last end the last."""
    numbers = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, numbers, right=True).clamp_max(experts - 1)


def _without_others(y: Tensor, ends: Tensor) -> Tensor:
    """y with zeros in rows behind the last end, which grouped_mm leaves as they are."""
    numbers = torch.arange(len(y), device=ends.device)
    return y.masked_fill((numbers >= ends[-1])[:, None], 0)
