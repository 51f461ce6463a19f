"""Replaces the logits of a module's router while the module's own code runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moec.capture.behaviour.failure import running_line
from moec.errors import NoMatch

_SEQUENCES = (list, tuple)


class Steer(TorchFunctionMode):
    """Replaces the product of activations with the router's `weight` by `logits` [T, C].

    The weight is followed through views, casts and norms of it alone. Each product with it whose
    last axis has `columns` entries is taken for the logits.

    Raises NoMatch after `most` calls: a loop until convergence may not end for such logits.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        columns: int,
        logits: torch.Tensor,
        most: float = math.inf,
    ) -> None:
        super().__init__()
        self.derived = {id(weight): weight}
        self.columns, self.logits = columns, logits
        self.most, self.calls = most, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.calls += 1
        if self.calls > self.most:
            most, self.most = self.most, math.inf  # a `with` around the loop has calls at its end
            raise NoMatch(
                f"with other logits in its router it does not end: {running_line()} is reached "
                f"after {most} operations, as in a loop until convergence"
            )
        result = func(*args, **(kwargs or {}))
        if not (_holds(args, self.derived) or (kwargs and _holds(kwargs.values(), self.derived))):
            return result
        read = _tensors(args)
        if kwargs:
            read += _tensors(kwargs.values())
        watched = sum(id(t) in self.derived for t in read)
        if not isinstance(result, torch.Tensor):
            return result
        if watched == len(read):
            self.derived[id(result)] = result
            return result
        if not (result.is_floating_point() and result.dim() and result.shape[-1] == self.columns):
            return result
        return self.logits.to(result.dtype).reshape(result.shape).clone()


def _holds(values: Iterable[Any], derived: Mapping[int, torch.Tensor]) -> bool:
    """Whether one of these tensors is in nested lists, tuples and dicts.

    This runs for each operation of a forward. torch's own traversal, which supports every
    registered container, would take as long as the operation itself.
    """
    for value in values:
        if id(value) in derived:
            return True
        if isinstance(value, _SEQUENCES):
            if _holds(value, derived):
                return True
        elif isinstance(value, dict) and _holds(value.values(), derived):
            return True
    return False


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    tensors: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, _SEQUENCES):
            tensors += _tensors(value)
        elif isinstance(value, dict):
            tensors += _tensors(value.values())
    return tensors
