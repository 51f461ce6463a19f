"""What is replaced while torch.export traces a module."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch

from moec import torch_private
from moec.capture.intercept.arithmetic import MATH, checked, floor_divided, of_sizes, rounded
from moec.capture.intercept.float_conditions import SYMBOLIC_OPERANDS, with_ranges
from moec.capture.intercept.interceptor import Handler
from moec.capture.intercept.stacks import Internal, ShortStack
from moec.capture.intercept.substitutes import TYPES
from moec.capture.intercept.texts import NUMBERS, text_of
from moec.torch_private import parse_to, place, python_function, pytree


def traced_handlers() -> Iterator[Handler]:
    """The handlers of every export."""
    # sizes as numbers
    yield from (Handler(builtins, name, handler) for name, handler in TYPES.items())
    yield from (Handler(math, name, of_sizes(getattr(math, name))) for name in MATH)
    yield from (Handler(kind, "__repr__", text_of(kind)) for kind in NUMBERS)
    yield Handler(torch.SymInt, "__round__", rounded)
    for kind in (torch.SymInt, torch.SymFloat):
        yield Handler(kind, "__floordiv__", floor_divided(kind.__floordiv__))
    # functions of torch that an export cannot trace as they are
    attention = torch.nn.functional.scaled_dot_product_attention
    yield Handler(torch.nn.functional, attention.__name__, _with_plain_bools(attention))
    yield Handler(torch.nn.Module, "to", _cast(torch.nn.Module.to))
    yield Handler(torch.jit.ScriptFunction, "__call__", _as_python)
    # how torch traces
    traced, ranged = torch_private.handle_sym_dispatch, torch_private.maybe_evaluate_static
    yield Handler(*place("handle_sym_dispatch"), checked(traced))
    yield Handler(*place("maybe_evaluate_static"), with_ranges(ranged))
    yield Handler(*place("fake_sym_int"), SYMBOLIC_OPERANDS)
    yield Handler(*place("uninteresting_files"), Internal)
    yield Handler(*place("CapturedTraceback"), ShortStack)
    yield Handler(*place("extract_tensor_metadata"), lambda tensor: None)


def _with_plain_bools(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(is_causal=mask is None and length > 1)`: the condition is a SymBool, which torch
    rejects before any torch function mode sees the call. It becomes a bool with a guard, as by an
    `if`."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(torch.SymBool, bool, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Module.to`, which does nothing for a module that already has the dtype and device.

    Some modules cast a submodule in their forward (the router of Switch Transformers does).
    torch.export cannot trace `Module.to`, even where it changes nothing.
    """

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = parse_to(*args, **kwargs)
        done = all(
            (dtype is None or not p.is_floating_point() or p.dtype == dtype)
            and (device is None or p.device == torch.device(device))
            for p in self.parameters()
        )
        return self if done else original(self, *args, **kwargs)

    return to


def _as_python(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the Python function that a scripted function was compiled from. TorchScript would use
    the example's numbers for sizes and record no guard."""
    return python_function(function)(*args, **kwargs)
