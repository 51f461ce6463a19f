"""A module whose router gives logits of our choice, while its code runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Steer(TorchFunctionMode):
    """Watches the product of activations with the router's `weight`, and replaces it.

    A weight is followed through views, casts and norms of its own. The first of its products
    whose last axis has `columns` entries is the logits: `seen` holds them, and `logits` [T, C]
    are given in their stead. With `weight` None nothing is watched.
    """

    def __init__(
        self, weight: torch.Tensor | None, columns: int, logits: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.derived = {} if weight is None else {id(weight): weight}
        self.columns, self.logits = columns, logits
        self.observed: torch.Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.derived:
            return result
        read = _tensors((args, kwargs))
        watched = sum(id(t) in self.derived for t in read)
        if not watched or not isinstance(result, torch.Tensor):
            return result
        if watched == len(read):
            self.derived[id(result)] = result
            return result
        if not (result.is_floating_point() and result.dim() and result.shape[-1] == self.columns):
            return result
        self.observed = result.detach().clone()
        if self.logits is None:
            return result
        return self.logits.to(result.dtype).reshape(result.shape).clone()


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts. It runs for each operation of an observed
    forward; torch's own traversal, which knows every registered container, takes as long as the
    operation."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for entry in value for tensor in _tensors(entry)]
