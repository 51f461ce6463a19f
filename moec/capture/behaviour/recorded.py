"""Records how a model calls its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ExampleCall:
    """One call of a module, recorded while the whole model ran on its example."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class ModelExample:
    """A module with its example arguments."""

    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def record(self, names: Sequence[str]) -> dict[str, ExampleCall]:
        """How the example calls the modules of these names, for each the last time; modules that
        are not called are left out."""
        modules = dict(self.module.named_modules())
        calls: dict[str, ExampleCall] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
                calls[name] = ExampleCall(args, kwargs, result)

            return keep

        handles = [
            modules[name].register_forward_hook(hook(name), with_kwargs=True) for name in names
        ]
        try:
            with torch.no_grad():
                self.module(*self.args, **self.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return calls


def may_hold_experts(module: nn.Module) -> bool:
    """Whether a direct child is a list of submodules, or any parameter has three axes [E, ..]."""
    for part in module.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict) and len(part) > 1:
            return True
    return any(p.dim() == 3 for p in module.parameters())
