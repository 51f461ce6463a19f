"""Inputs that the user declares constant: what Python computes of them is computed once.

The grid of an image (`image_grid_thw`) decides sizes: a vision tower reads it into Python, splits
by it and loops over it. torch.export refuses that, because a tensor of a trace has no values. A
constant input stays an ordinary tensor during the trace. Functions of ordinary tensors only are
computed at once, outside of the trace; where such a tensor meets one of the trace, it becomes a
constant of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moec.errors import UsageError
from moec.torch_private import disable_current_modes, pytree

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CREATION = frozenset({"arange", "tensor", "linspace"})
"""Functions whose results are ordinary tensors where their arguments are plain numbers."""


def constant_numbers(constants: str | Collection[str], names: Sequence[str]) -> frozenset[int]:
    """The numbers of the tensors in `names` that are constant. Raises UsageError for other names,
    and where nothing would be left to vary."""
    chosen = {constants} if isinstance(constants, str) else set(constants)
    unknown = chosen - set(names)
    if unknown:
        raise UsageError(
            f"constants names {', '.join(sorted(unknown))}, but the inputs are {', '.join(names)}"
        )
    if names and chosen == set(names):
        raise UsageError("constants names every input; leave out those that vary")
    return frozenset(number for number, name in enumerate(names) if name in chosen)


def noted(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """A note for the report about each constant input."""
    return tuple(
        f"{name} is always {tensor.tolist() if tensor.numel() <= 12 else 'that of the example'}"
        for name, tensor in zip(names, tensors, strict=True)
    )


@contextmanager
def constants_computed(active: bool) -> Iterator[None]:
    """While open, functions of ordinary tensors are computed at once, if `active`."""
    if not active:
        yield
        return
    with _Constants():
        yield


def is_ordinary(value: Any) -> bool:
    """Whether a tensor has values, and is neither a weight nor a tensor of the trace."""
    return type(value) is torch.Tensor


class _Constants(TorchFunctionMode):
    """Computes functions of ordinary tensors outside of all other modes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, named = pytree.tree_map(self._latest, (args, dict(kwargs or {})))
        leaves = pytree.tree_leaves((args, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        symbolic = any(isinstance(leaf, _SYMBOLIC) for leaf in leaves)
        name = getattr(func, "__name__", "")
        if not symbolic and (all(map(is_ordinary, tensors)) if tensors else name in _CREATION):
            with disable_current_modes():
                return func(*args, **named)
        if args and is_ordinary(args[0]) and _writes(name):
            traced = args[0].clone()
            self.written[id(args[0])] = (args[0], traced)
            args = (traced, *args[1:])
        return func(*args, **named)

    def _latest(self, leaf: Any) -> Any:
        """A tensor, or what replaced it when a tensor of the trace was written into it."""
        return self.written.get(id(leaf), (leaf, leaf))[1]


def _writes(name: str) -> bool:
    """Whether a function of this name writes into its first operand."""
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_")
