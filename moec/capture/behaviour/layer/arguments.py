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
    """The arguments of a call. `tokens` is the position of the tokens among `leaves`, `ids` that of
    the expert ids where the caller chooses the experts; all other arguments are fixed."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    tokens: int
    ids: int | None = None

    @staticmethod
    def of(args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a recorded call.

        Raises NoMatch where no argument is a float tensor of tokens [T, D] or [B, S, D], or where
        there are tensors besides the tokens and one tensor of integer ids, one id a token.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        tensors = {i: t for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)}
        floats = [i for i, t in tensors.items() if t.is_floating_point() and t.dim() in (2, 3)]
        if not floats:
            raise NoMatch("none of its arguments are tokens, floats of shape [T, D] or [B, S, D]")
        tokens = leaves[floats[0]]
        ids = None
        for i, tensor in tensors.items():
            if i == floats[0]:
                continue
            integer = not tensor.is_floating_point() and tensor.dtype is not torch.bool
            if ids is None and integer and tensor.shape == tokens.shape[:-1]:
                ids = i
            else:
                raise NoMatch(
                    f"it reads a tensor of shape {tuple(tensor.shape)} besides its tokens, which "
                    "is not varied"
                )
        return Arguments(tuple(leaves), spec, floats[0], ids)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaves[self.tokens].shape)

    def build(
        self, tokens: torch.Tensor, ids: torch.Tensor | None = None
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """(args, kwargs) of the call with other tokens and ids."""
        leaves = list(self.leaves)
        leaves[self.tokens] = tokens
        if self.ids is not None:
            leaves[self.ids] = ids
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def tensors(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens and ids of another call. Raises NoMatch where any other argument differs."""
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        if spec != self.spec:
            raise NoMatch("it is called with other arguments than in the example")
        for i, (ours, theirs) in enumerate(zip(self.leaves, leaves, strict=True)):
            if i not in (self.tokens, self.ids) and ours is not theirs and ours != theirs:
                raise NoMatch(f"it is called with {theirs!r} instead of {ours!r}")
        return leaves[self.tokens], None if self.ids is None else leaves[self.ids]
