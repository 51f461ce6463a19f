"""What a module's behaviour depends on beside its weights, to see changes after it was observed.

Dynamo traces the comparison, so that its guards hold what was compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from moec.dynamo.forwards import FORWARDS
from moec.torch_private import hooks_of, pre_hooks_of

_PLAIN = (bool, int, float, str, type(None), torch.dtype, FunctionType, BuiltinFunctionType)


@dataclass(frozen=True)
class ModuleStructure:
    """`parts` has a line for each submodule, `plain` the names and values of its attributes that
    are numbers, texts or functions."""

    parts: tuple[tuple[object, ...], ...]
    plain: tuple[tuple[str, str, Any], ...]

    @staticmethod
    def of(module: nn.Module) -> ModuleStructure:
        return ModuleStructure(tuple(_parts(module)), tuple(_plain(module)))

    def is_that_of(self, module: nn.Module) -> bool:
        if tuple(_parts(module)) != self.parts:
            return False
        modules = dict(module.named_modules())
        return all(
            getattr(modules[name], key, _MISSING) == value for name, key, value in self.plain
        )


_MISSING = "(missing)"


def _parts(module: nn.Module) -> Iterator[tuple[object, ...]]:
    for name, part in module.named_modules():
        yield (
            name,
            type(part),
            part.training,
            *(tuple(hooks) for hooks in (hooks_of(part), pre_hooks_of(part))),
            *(f"{key} {tuple(p.shape)}" for key, p in part.named_parameters(recurse=False)),
            *(f"{key} {tuple(b.shape)}" for key, b in part.named_buffers(recurse=False)),
            FORWARDS not in part.__dict__ and _has_own_forward(part),
        )


def _has_own_forward(part: nn.Module) -> bool:
    """Whether the instance has a forward. Dynamo has no guard for the second condition alone."""
    return not inspect.ismethod(part.forward) or "forward" in part.__dict__


def _plain(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, _PLAIN) and not key.startswith("_") and key != "training":
                yield name, key, value
