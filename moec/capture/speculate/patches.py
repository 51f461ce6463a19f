"""What is replaced, beside what every export replaces, while a module is traced under hooks."""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moec import torch_private
from moec.capture.intercept.arithmetic import floor_divides
from moec.capture.intercept.interceptor import Handler, intercepted
from moec.capture.intercept.substitutes import SHADOWS
from moec.capture.speculate.branches import Branches, is_condition
from moec.capture.speculate.facts.rounding import Rounding, divided
from moec.capture.speculate.operators.hooks import Trace
from moec.capture.speculate.operators.mode import Speculation
from moec.torch_private import (
    FakeTensor,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    place,
    plain_setup_context,
)

_CONTEXT = (
    "save_for_backward save_for_forward mark_non_differentiable mark_dirty set_materialize_grads"
).split()


@contextmanager
def speculating(module: torch.nn.Module, trace: Trace) -> Iterator[Speculation]:
    """While open, the code of `module` runs under the hooks of `trace`. One thread at a time."""
    mode = Speculation(trace)
    with intercepted(module, _handlers(mode, trace), trace.branches.foreign), mode:
        yield mode


def _handlers(mode: Speculation, trace: Trace) -> Iterator[Handler]:
    yield from (Handler(builtins, name, handler) for name, handler in SHADOWS.items())
    yield Handler(*place("evaluate_expr"), _evaluate(torch_private.evaluate_expr, trace.branches))
    yield Handler(FakeTensor, "tolist", lambda tensor: mode.hooks["tolist"](None, tensor))
    yield Handler(torch.autograd.Function, "apply", classmethod(_forward_alone))
    for how in ("floor", "ceil", "trunc"):
        name = f"__{how}__"
        yield Handler(torch.SymFloat, name, _rounded(how, getattr(torch.SymFloat, name), trace))


def _evaluate(original: Callable[..., Any], branches: Branches) -> Callable[..., Any]:
    """Replaces the function that evaluates every condition on symbolic numbers."""

    def evaluate_expr(env: ShapeEnv, condition: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(env, condition, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            if not is_condition(condition):
                raise
            return branches.decide(env, condition)

    return evaluate_expr


def _forward_alone(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the forward of a custom autograd.Function; what it saves for backward is discarded."""
    split = cls.setup_context is not plain_setup_context
    if split:
        return cls.forward(*args, **kwargs)
    nothing = dict.fromkeys(_CONTEXT, lambda *_, **__: None)
    context = types.SimpleNamespace(needs_input_grad=(False,) * len(args), **nothing)
    return cls.forward(context, *args, **kwargs)


def _rounded(how: Any, original: Callable[[Any], Any], trace: Trace) -> Callable[[Any], Any]:
    rounding: Rounding = how

    def rounded(value: torch.SymFloat) -> Any:
        integer = None if floor_divides() else divided(value, rounding, trace.sizes)
        return original(value) if integer is None else integer

    return rounded
