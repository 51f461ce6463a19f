"""Eager PyTorch that chooses the first of equal values, as the kernels do.

torch.topk, torch.sort and torch.max do not specify an order among equal values. Exactly equal
scores are common after a ReLU: the indexers of sparse attention give 0 to every key that no head
selects. Either choice is right, but the results differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moec.torch_private import TorchDispatchMode

aten = torch.ops.aten


class FirstOfEquals(TorchDispatchMode):  # type: ignore[misc]
    """While open, choices among equal values take the first."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _STABLE.get(func, func)(*args, **(kwargs or {}))


def _sort(x: torch.Tensor, dim: int = -1, descending: bool = False) -> Any:
    return torch.sort(x, dim=dim, descending=descending, stable=True)


def _topk(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not x.ndim:
        return x.clone(), torch.zeros((), dtype=torch.int64)
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()


def _first(better: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def index(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
        if dim is None or not x.ndim:
            return index(x.reshape(-1), 0).reshape([1] * x.ndim if keepdim else [])
        best = better(x, dim=dim, keepdim=True)
        positions = torch.arange(x.shape[dim]).view([-1, *[1] * (x.ndim - 1 - dim % x.ndim)])
        equal = (x == best) | (x != x)  # a NaN counts as the best
        return torch.where(equal, positions, x.shape[dim]).amin(dim, keepdim=keepdim)

    return index


def _extreme(better: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def extreme(x: torch.Tensor, dim: int, keepdim: bool = False) -> Any:
        return better(x, dim=dim, keepdim=keepdim), _first(better)(x, dim, keepdim)

    return extreme


_STABLE: Mapping[Any, Callable[..., Any]] = {
    aten.sort.default: _sort,
    aten.topk.default: _topk,
    aten.argmax.default: _first(torch.amax),
    aten.argmin.default: _first(torch.amin),
    aten.max.dim: _extreme(torch.amax),
    aten.min.dim: _extreme(torch.amin),
}

CHOOSING = frozenset(f"aten.{f.__name__}" for f in _STABLE)
"""The names of the ops that choose among values."""
