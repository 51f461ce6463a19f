"""Attributes that a module sets in its forward: tables that it computes at the first call.

    if self.positions is None or len(self.positions) < n:
        self.positions = torch.arange(n)

A trace computes such a table anew, of symbolic sizes. It must begin without the tables of trial
runs, which would be constants of one length, and leave none of its own behind: they have no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin

HOOKS = frozenset(name for name in vars(torch.nn.Module()) if name.endswith("_hooks"))
"""Tables of hooks. A first call of transformers' models adds some and sets an attribute that says
so; both go back together, or the next call would add them twice."""
_OF_TORCH = frozenset(vars(torch.nn.Module())) - {"_buffers"} - HOOKS
"""Parameters and submodules stay as a forward leaves them: modules are cast and filled."""
_ABSENT = object()


@contextmanager
def attributes_kept(module: torch.nn.Module) -> Iterator[None]:
    """On leaving, the attributes, buffers and hooks of all parts of `module` are those of entering,
    and so is what dictionaries and lists in them hold."""
    before = [(holder, holder.copy()) for holder in _holders(module)]
    try:
        yield
    finally:
        for holder, content in before:
            _restore(holder, content)


def _holders(module: torch.nn.Module) -> Iterator[Any]:
    visited = set[int]()
    for part in module.modules():
        if isinstance(part, LazyModuleMixin):
            continue
        yield vars(part)
        pending = [value for name, value in vars(part).items() if name not in _OF_TORCH]
        while pending:
            holder = pending.pop()
            if isinstance(holder, dict | list) and id(holder) not in visited:
                visited.add(id(holder))
                yield holder
                pending += holder.values() if isinstance(holder, dict) else holder


def _restore(holder: Any, content: Any) -> None:
    if isinstance(holder, list):
        if len(holder) != len(content) or any(
            a is not b for a, b in zip(holder, content, strict=True)
        ):
            holder[:] = content
        return
    for name in [name for name in holder if name not in content and name not in _OF_TORCH]:
        del holder[name]
    for name, value in content.items():
        if name not in _OF_TORCH and holder.get(name, _ABSENT) is not value:
            holder[name] = value
