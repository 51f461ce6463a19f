"""Hooks for parts of training code that have no effect in eval mode: batch statistics and noise."""

from __future__ import annotations

from typing import Any

import torch

from moec.capture.speculate.hooks import Hook, Hooks, Trace


def batch_norm(
    trace: Trace,
    func: Hook,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """(x - mean) / sqrt(var + eps) * weight + bias, with the running statistics."""
    if training or mean is None or var is None:
        return NotImplemented
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = (x - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


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
    "batch_norm": batch_norm,
    "dropout": dropout,
    **dict.fromkeys(("randn_like", "rand_like", "randn", "rand", "normal"), noise),
    **dict.fromkeys(("normal_", "uniform_"), drawn),
    **dict.fromkeys(("bernoulli", "bernoulli_", "multinomial", "exponential_", "randint"), dropped),
}
