"""Conditions on sizes that are passed to a function which requires a plain bool.

    is_causal = mask is None and length > 1
    scaled_dot_product_attention(q, k, v, is_causal=is_causal)

During an export `is_causal` is a SymBool, which the function rejects before any torch function mode
sees the call. It is converted to a bool with a guard, as an `if` would do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

_ATTENTION = torch.nn.functional.scaled_dot_product_attention


@wraps(_ATTENTION)
def _attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    args, kwargs = pytree.tree_map_only(torch.SymBool, bool, (args, kwargs))
    result: torch.Tensor = _ATTENTION(*args, **kwargs)
    return result


@contextmanager
def sym_bools_answered(model: torch.nn.Module) -> Iterator[None]:
    """While open, attention takes a SymBool: the function is replaced in torch, and under each name
    by which a module that defines a class of the model imported it."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    spaces = {id(space): space for cls in classes if (space := _namespace(cls))}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.functional, _ATTENTION.__name__, _attention))
        for space in spaces.values():
            names = [name for name, value in space.items() if value is _ATTENTION]
            stack.enter_context(mock.patch.dict(space, dict.fromkeys(names, _attention)))
        yield


def _namespace(cls: type) -> dict[str, Any]:
    module = sys.modules.get(cls.__module__)
    return {} if module is None or cls.__module__.startswith("torch") else vars(module)
