"""Replaces private functions of torch while a module is traced.

All knowledge of torch's private code in this package is in this file and in `branches.py`.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from moec.capture.speculate.branches import Branches, is_condition
from moec.capture.speculate.facts.rounding import Rounding, divided
from moec.capture.speculate.operators.chosen import update_counter
from moec.capture.speculate.operators.hooks import Trace
from moec.capture.speculate.operators.mode import Speculation
from moec.capture.speculate.user_globals import user_globals
from moec.capture.user_code.shadows import SHADOWS, shadowed

_CONTEXT = (
    "save_for_backward save_for_forward mark_non_differentiable mark_dirty set_materialize_grads"
).split()


@contextmanager
def speculating(module: torch.nn.Module, trace: Trace) -> Iterator[Speculation]:
    """While open, the code of `module` runs under the hooks of `trace`. One thread at a time."""
    mode = Speculation(trace)
    with ExitStack() as stack:
        for names in user_globals(module, trace.branches.foreign):
            stack.enter_context(mock.patch.dict(names, shadowed(names, SHADOWS)))
        for owner, name, function in _functions(mode, trace):
            stack.enter_context(mock.patch.object(owner, name, function, create=True))
        stack.enter_context(mode)
        yield mode


@contextmanager
def scripts_as_python() -> Iterator[None]:
    """While open, a scripted function runs as the Python function that it was compiled from.
    TorchScript would use the example's numbers for sizes and record no guard."""
    with mock.patch.object(torch.jit.ScriptFunction, "__call__", _as_python):
        yield


def _functions(mode: Speculation, trace: Trace) -> Iterator[tuple[Any, str, Any]]:
    yield ShapeEnv, "evaluate_expr", _evaluate(ShapeEnv.evaluate_expr, trace.branches)
    yield Counter, "update", update_counter(Counter.update)
    yield FakeTensor, "tolist", lambda tensor: mode.hooks["tolist"](None, tensor)
    yield torch.autograd.Function, "apply", classmethod(_forward_alone)
    for how in ("floor", "ceil", "trunc"):
        name = f"__{how}__"
        yield torch.SymFloat, name, _rounded(how, getattr(torch.SymFloat, name), trace)


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
    split = cls.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context
    if split:
        return cls.forward(*args, **kwargs)
    nothing = dict.fromkeys(_CONTEXT, lambda *_, **__: None)
    context = types.SimpleNamespace(needs_input_grad=(False,) * len(args), **nothing)
    return cls.forward(context, *args, **kwargs)


def _as_python(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the Python function that a scripted function was compiled from."""
    return function._torchdynamo_inline(*args, **kwargs)


def _rounded(how: Any, original: Callable[[Any], Any], trace: Trace) -> Callable[[Any], Any]:
    rounding: Rounding = how

    def rounded(value: torch.SymFloat) -> Any:
        integer = divided(value, rounding, trace.sizes)
        return original(value) if integer is None else integer

    return rounded
