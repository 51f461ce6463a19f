"""What is replaced while torch.export traces a module."""

from __future__ import annotations

import ast
import builtins
import linecache
import logging
import math
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from traceback import FrameSummary, StackSummary
from types import FrameType
from typing import Any

import sympy
import torch

from moec import torch_private
from moec.capture.decomposition.kernels import take_along_dim
from moec.capture.intercept.arithmetic import MATH, checked, floor_divided, of_sizes, rounded
from moec.capture.intercept.interceptor import Handler
from moec.capture.intercept.substitutes import TYPES
from moec.capture.user_code.sources import is_internal, is_standard
from moec.torch_private import ToFloat, bound_sympy, parse_to, place, python_function, pytree

# The text of a symbolic size, such as f"{n}", is that of the example's number.
#
# torch writes the symbol ("s77"), so that a comparison of texts, or their length, would decide what
# is computed without a guard. Here the number is written, and the guard refuses other sizes with
# the user's line. Texts that are printed, logged or raised cannot change a result, and are left
# alone.

_WRITERS = re.compile(
    r"(.*\.)?(print|debug|info|warning|error|exception|critical|log|info_once|record_function|"
    r"range_push|\w*(check|assert|warn)\w*)$"  # torch._check, transformers' torch_compilable_check
)
_RECORDS = (logging.__file__, warnings.__file__, traceback.__file__)
"""The parts of the standard library whose texts are only read by people."""
NUMBERS: dict[type, Callable[[Any], Any]] = {
    torch.SymInt: int,
    torch.SymFloat: float,
    torch.SymBool: bool,
}
"""The types of symbolic numbers, and the function that gives the example's number."""


def text_of(kind: Any) -> Callable[[Any], str]:
    """In the place of `kind.__repr__`: the text of the example's number in the user's code."""
    symbol, number = kind.__repr__, NUMBERS[kind]

    def __repr__(size: Any) -> str:
        return repr(number(size)) if _decides(sys._getframe(1)) else symbol(size)

    return __repr__


def _decides(frame: FrameType) -> bool:
    """Whether a text that is made in this frame may change a result. One that the standard library
    makes (`pprint.pformat(n)`) is that of the code that calls it."""
    caller: FrameType | None = frame
    while caller is not None and is_standard(caller.f_code.co_filename):
        caller = None if caller.f_code.co_filename in _RECORDS else caller.f_back
    if caller is None:
        return False
    file = caller.f_code.co_filename
    return not is_internal(file) and caller.f_lineno not in _written(file)


@lru_cache(maxsize=256)
def _written(file: str) -> frozenset[int]:
    """The lines of a file's statements that write or raise a text; none where its text is
    missing. A call whose value is used may decide by its text."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    parts = (part for node in ast.walk(tree) if (part := _text(node)) is not None)
    return frozenset(n for part in parts for n in range(part.lineno, part.end_lineno + 1))


def _text(node: ast.AST) -> Any:
    """The part of a statement whose text nothing but people read."""
    match node:
        case ast.Raise():
            return node
        case ast.Assert():
            return node.msg
        case ast.Expr(value=ast.Call(func=f)) | ast.withitem(context_expr=ast.Call(func=f)):
            part = node if isinstance(node, ast.Expr) else node.context_expr
            return part if _WRITERS.match(ast.unparse(f)) else None
    return None


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
    yield from (Handler(owner, "take_along_dim", take_along_dim) for owner in (torch, torch.Tensor))
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


class ShortStack:
    """In place of torch's CapturedTraceback, which reads the source line of each frame of the
    process for each node. torch keeps the frames of `forward` that are not internal: the text is
    the same, in a third of the time."""

    @staticmethod
    def extract() -> ShortStack:
        return ShortStack()

    def summary(self) -> StackSummary:
        """The frames of the user's `forward` in the stack of the caller, outermost first. Lines are
        read when the stack is printed."""
        frames: list[tuple[str, int, str]] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and not is_internal(code.co_filename):
                frames.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back
        return StackSummary(FrameSummary(*entry, lookup_line=False) for entry in reversed(frames))


class Internal:
    """In place of torch's set of files without user code, among which it looks for the line of a
    guard: those of torch, moec and Python."""

    def __contains__(self, file: object) -> bool:
        return isinstance(file, str) and (is_internal(file) or is_standard(file))


# What torch decides of floats of sizes while it traces.
#
#     x[: math.isqrt(batch * length)]
#
# torch writes each size as a positive symbol plus a number, and multiplies them out, before it
# looks for the range of a float: of b * s - b - s + 1 it finds no sign. The end of the slice then
# may be negative, and its length becomes a symbol that has nothing to do with the capacity.
#
#     t = torch.tensor(2.0) * (n / 6)
#     y = x * (3 if t > 2 else 1)
#
# torch evaluates operators on literals. It leaves out those with a symbolic integer, but not those
# with a symbolic float: the branch would go as in the example, without a guard.
SYMBOLIC_OPERANDS = (torch.SymInt, torch.SymFloat)
"""In the place of SymInt in torch's file of fake tensors: types of operands that keep an operator
on literals from being evaluated."""


def with_ranges(plain: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of ShapeEnv's static evaluation: a condition on floats is also decided by the
    ranges of the sizes as they are."""

    @wraps(plain)  # torch clears its cache
    def evaluate(env: Any, expr: sympy.Basic, *args: Any, **options: Any) -> Any:
        result = plain(env, expr, *args, **options)
        if result is not None or not isinstance(expr, sympy.Rel) or not expr.has(ToFloat):
            return result
        truth = bound_sympy(expr, env.var_to_range)
        return truth.lower if truth.is_singleton() else None

    return evaluate
