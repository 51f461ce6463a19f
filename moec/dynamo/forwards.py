"""Replaces the forward of a module; the replacement may still call the previous one."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

FORWARDS = "moec_forwards"
"""The attribute of a module that holds, by name of the replacement, the forward that the instance
had beside that of its class, such as that of accelerate; None if it had none."""


def replace_forward(module: nn.Module, name: str, forward: Callable[..., Any]) -> None:
    """Makes `forward` the module's method, also in copies of the module; once for each `name`."""
    previous = module.__dict__.setdefault(FORWARDS, {})
    if name not in previous:
        previous[name] = module.__dict__.get("forward")
        module.forward = MethodType(forward, module)


def previous_forward(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward that the module had before the replacement `name`."""
    previous = module.__dict__[FORWARDS][name]
    if previous is None:
        return type(module).forward(module, *args, **kwargs)
    return previous(*args, **kwargs)


def restore_forward(module: nn.Module, name: str, forward: Callable[..., Any]) -> None:
    """Takes back the replacement `name` by `forward`, unless another came later."""
    replacement = module.__dict__.get("forward")
    if getattr(replacement, "__func__", None) is not forward:
        return
    previous = module.__dict__[FORWARDS].pop(name)
    if previous is None:
        del module.forward
    else:
        module.forward = previous
