"""Identifies everything that a module returns: tensors that a description has, or constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.layer.description import Constant, Output
from moec.capture.behaviour.layer.parts import float_dtype
from moec.capture.behaviour.proof.probe import Probe, result_leaves
from moec.capture.behaviour.replacement import Replacement, shaped
from moec.errors import NoMatch
from moec.oracle.tolerance import are_close


def find_outputs(probe: Probe, replacement: Replacement) -> tuple[Output | Constant, ...]:
    """What each leaf of the result is.

    Raises NoMatch for a tensor that the replacement does not compute, and for a number that depends
    on the input.
    """
    tokens = probe.tokens(2, 12)
    first, other = probe.run(tokens), probe.run(probe.tokens(1, 5))
    with torch.no_grad():
        named = replacement(tokens)
    items: list[Output | Constant] = []
    for (name, value), (_, again) in zip(first.leaves, other.leaves, strict=True):
        if isinstance(value, torch.Tensor):
            items.append(_output(name, value, named, tokens))
        elif value != again:
            raise NoMatch(f"{name} is a number that depends on the input: {value}, then {again}")
        else:
            items.append(Constant(value))
    return tuple(items)


def cast_outputs(
    module: nn.Module, probe: Probe, items: Sequence[Output | Constant]
) -> tuple[Output | Constant, ...]:
    """The outputs with the dtypes that a 16-bit module returns, where these are not its own."""
    dtype = float_dtype(module)
    if dtype is torch.float32:
        return tuple(items)
    args, kwargs = probe.arguments.build(probe.tokens(2, 12).to(dtype))
    with torch.no_grad():
        leaves = result_leaves(module(*args, **kwargs))
    return tuple(
        replace(item, cast=str(value.dtype).removeprefix("torch."))
        if isinstance(item, Output) and value.is_floating_point() and value.dtype is not dtype
        else item
        for item, (_, value) in zip(items, leaves, strict=True)
    )


def _output(
    name: str, value: torch.Tensor, named: Mapping[str, torch.Tensor], x: torch.Tensor
) -> Output:
    dtype = str(value.dtype).removeprefix("torch.")
    leading = _leading(value, x)
    for key, tensor in named.items():
        output = Output(key, leading, dtype)
        if tensor.numel() == value.numel():
            formed = shaped(tensor, output, x)
            if formed.dtype == value.dtype and are_close(formed, value):
                return output
    if value.numel() == x.numel() and leading:  # accepted for now: the proof reports the difference
        return Output("hidden", leading, dtype)
    raise NoMatch(f"{name}, of shape {tuple(value.shape)}, is not reproduced")


def _leading(value: torch.Tensor, x: torch.Tensor) -> str:
    tokens = x.numel() // x.shape[-1]
    if value.dim() and value.shape[:-1] == x.shape[:-1]:
        return "tokens"
    if value.shape == x.shape[:-1]:
        return "token"
    return "rows" if value.dim() == 2 and value.shape[0] == tokens else ""


def result_like(result: Any, values: Sequence[Any]) -> Any:
    """The containers of `result` with the leaves `values`."""
    return _rebuilt(result, iter(values))


def _rebuilt(result: Any, values: Iterator[Any]) -> Any:
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return type(result)(*(_rebuilt(item, values) for item in result))
    if isinstance(result, tuple | list):
        return type(result)(_rebuilt(item, values) for item in result)
    if isinstance(result, dict):
        return type(result)(**{key: _rebuilt(item, values) for key, item in result.items()})
    if is_dataclass(result) and not isinstance(result, type):
        named = {f.name: _rebuilt(getattr(result, f.name), values) for f in fields(result)}
        return type(result)(**named)
    return next(values)
