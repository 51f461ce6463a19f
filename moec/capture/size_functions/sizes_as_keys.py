"""Symbolic sizes as arguments of cached functions, and as keys of dicts and sets.

A key is looked up by its hash, and a symbolic size has none: that of the example's number would
take the entry of the example for all sizes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from moec.capture.size_functions.sizes_as_numbers import LIBRARIES
from moec.capture.speculate.sites import foreign
from moec.capture.speculate.user_globals import user_globals
from moec.errors import CaptureError

_CACHED = type(functools.lru_cache(len))
_SYMBOLIC = (torch.SymInt, torch.SymFloat)


@contextmanager
def sizes_as_keys(module: torch.nn.Module) -> Iterator[None]:
    """While open, cached functions of the user's code (functools.cache and lru_cache) take sizes,
    for which they are computed in each call, and a size as a key raises CaptureError."""
    others = foreign(name for name in LIBRARIES if name in sys.modules)
    with ExitStack() as stack:
        for names in user_globals(module, others):
            stack.enter_context(mock.patch.dict(names, _with_sizes(names)))
        for kind in {base for part in module.modules() for base in type(part).__mro__}:
            for name, function in _with_sizes(vars(kind)).items():
                stack.enter_context(mock.patch.object(kind, name, function))
        stack.enter_context(mock.patch.object(torch.SymInt, "__hash__", _hash))
        yield


def _with_sizes(names: Mapping[str, Any]) -> dict[str, Any]:
    """The cached functions among `names`, as functions that also take sizes."""
    return {
        name: _with_size(value) for name, value in list(names.items()) if isinstance(value, _CACHED)
    }


def _with_size(cached: Any) -> Callable[..., Any]:
    # The tensors of a trace have no data: the user's cache would give them to later calls.
    in_trace = functools.cache(cached.__wrapped__)

    @functools.wraps(cached)
    def call(*args: Any, **kwargs: Any) -> Any:
        symbolic = any(isinstance(leaf, _SYMBOLIC) for leaf in pytree.tree_leaves((args, kwargs)))
        return cached.__wrapped__(*args, **kwargs) if symbolic else in_trace(*args, **kwargs)

    vars(call).update(
        cache_info=in_trace.cache_info,
        cache_clear=in_trace.cache_clear,
        cache_parameters=cached.cache_parameters,
    )
    return call


class SizeAsKey(CaptureError):
    """A size that varies is a key."""


def _hash(size: torch.SymInt) -> int:
    raise SizeAsKey(
        "a size that varies is a key of a dict, a set or a cache: compute the value of the entry "
        "from the size instead"
    )
