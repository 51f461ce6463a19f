"""The hooks as a torch function mode, which intercepts the user's calls of torch functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moec.capture.intercept.substitutes import python_type
from moec.capture.speculate.facts.following import follow
from moec.capture.speculate.operators.counting import COUNTING
from moec.capture.speculate.operators.evaluation import EVALUATION
from moec.capture.speculate.operators.hooks import Hooks, Trace
from moec.capture.speculate.operators.reading import READING
from moec.capture.speculate.operators.scattering import SCATTERING
from moec.capture.speculate.operators.sized_tensors import SIZING
from moec.capture.speculate.operators.slicing import SLICING
from moec.capture.speculate.operators.writing import WRITING
from moec.torch_private import pytree

_HOOKS: Hooks = {
    **READING,
    **COUNTING,
    **SIZING,
    **SLICING,
    **WRITING,
    **SCATTERING,
    **EVALUATION,
}

_IN_PLACE = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
)
"""Function names of `x += y` and the like, which write into x."""

_LIKE = frozenset("empty_like zeros_like ones_like new_empty new_zeros new_ones".split())
"""Functions that read no values of their operand: they may receive the buffer before it was filled,
which has a known length."""


class Speculation(TorchFunctionMode):
    """Runs the hooks of `trace`, and propagates facts through all other calls."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.hooks = {name: partial(hook, trace) for name, hook in _HOOKS.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        method = getattr(func, "__name__", "")
        if method == "__get__":  # x.T is a call of the property's getter
            method = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        like = args[:1] if method in _LIKE else ()
        args, named = self.latest((args[len(like) :], dict(kwargs or {})))
        args = (*like, *map(python_type, args))
        named = {name: python_type(value) for name, value in named.items()}
        name = method.strip("_") if method.startswith("__") else method
        out = named.pop("out", None)
        if isinstance(out, torch.Tensor):
            return self.hooks["out="](func, out, func(*args, **named))
        hook = self.hooks.get(method) or self.hooks.get(name)
        if hook is not None:
            result = hook(func, *args, **named)
            if result is not NotImplemented:
                return result
        result = func(*args, **named)
        if args and (name.endswith("_") or name in _IN_PLACE):
            self.trace.written(args[0])
        else:
            follow(self.trace.facts, name, args, named, result)
        return result

    def latest(self, tree: Any) -> Any:
        """`tree` with each buffer that was filled piece by piece replaced by its contents."""
        buffers = self.trace.buffers
        if not buffers:
            return tree
        return pytree.tree_map(lambda leaf: buffers.get(id(leaf), (leaf, leaf))[1], tree)
