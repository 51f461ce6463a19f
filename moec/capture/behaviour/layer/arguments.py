"""Records how a model calls a module, and builds such a call with other tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moec.errors import NoMatch
from moec.torch_private import pytree


@dataclass(frozen=True)
class RecordedCall:
    """One call of a module, recorded while the whole model ran on its example."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


def record(
    run: Callable[[], Any], modules: Iterable[tuple[str, nn.Module]]
) -> dict[str, RecordedCall]:
    """The last call of each of the modules during `run`, by name."""
    calls: dict[str, RecordedCall] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            calls[name] = RecordedCall(args, kwargs, result)

        return keep

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call. `position` is that of the tokens among `leaves`; all other arguments
    are fixed."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    position: int

    @staticmethod
    def of(args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a recorded call.

        Raises NoMatch where no argument is a float tensor of tokens [T, D] or [B, S, D], or where
        there are other tensors.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        tensors = {i: t for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)}
        floats = [i for i, t in tensors.items() if t.is_floating_point() and t.dim() in (2, 3)]
        if not floats:
            raise NoMatch("none of its arguments are tokens, floats of shape [T, D] or [B, S, D]")
        for i, tensor in tensors.items():
            if i != floats[0]:
                raise NoMatch(
                    f"it reads a tensor of shape {tuple(tensor.shape)} besides its tokens, which "
                    "is not varied"
                )
        return Arguments(tuple(leaves), spec, floats[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaves[self.position].shape)

    def build(self, tokens: torch.Tensor) -> tuple[Sequence[Any], dict[str, Any]]:
        """(args, kwargs) of the call with other tokens."""
        leaves = list(self.leaves)
        leaves[self.position] = tokens
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def tokens(self, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        """The tokens of another call. Raises NoMatch where any other argument differs."""
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        if spec != self.spec:
            raise NoMatch("it is called with other arguments than in the example")
        for i, (ours, theirs) in enumerate(zip(self.leaves, leaves, strict=True)):
            if i != self.position and ours is not theirs and ours != theirs:
                raise NoMatch(f"it is called with {theirs!r} instead of {ours!r}")
        tokens: torch.Tensor = leaves[self.position]
        return tokens
