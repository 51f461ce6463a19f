"""Hooks for random numbers of training code, which have no effect in eval mode."""

from __future__ import annotations

from typing import Any

import torch

from moec.capture.speculate.operators.hooks import Hook, Hooks, Trace


def noise(trace: Trace, func: Hook, *args: Any, **kwargs: Any) -> Any:
    """Zeros instead of random numbers; the proof shows that they do not change the result."""
    trace.noise[trace.at()] = None
    result = func(*args, **kwargs)
    return torch.zeros(result.shape, dtype=result.dtype)


def drawn(trace: Trace, func: Hook, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `noise`, written into x."""
    trace.noise[trace.at()] = None
    trace.written(x)
    return x.zero_()


def dropped(trace: Trace, func: Hook, *args: Any, **kwargs: Any) -> Any:
    """Random numbers for which zeros are no substitute: recorded with this line, so that a
    refusal can name it."""
    trace.noise[trace.at()] = None
    return NotImplemented


def dropout(trace: Trace, func: Hook, *args: Any, **kwargs: Any) -> Any:
    """Dropout, which draws no numbers in eval mode or where p is 0."""
    named = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    training = named.get("train", named.get("training", True))
    drops = training and named.get("p", 0.5)
    return dropped(trace, func, *args, **kwargs) if drops else NotImplemented


EVALUATION: Hooks = {
    "dropout": dropout,
    **dict.fromkeys(("randn_like", "rand_like", "randn", "rand", "normal"), noise),
    **dict.fromkeys(("normal_", "uniform_"), drawn),
    **dict.fromkeys(("bernoulli", "bernoulli_", "multinomial", "exponential_", "randint"), dropped),
}
