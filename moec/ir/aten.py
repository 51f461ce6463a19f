"""Calling an ATen op of the IR: attributes and inputs back into the arguments of its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sympy
import torch

from moec.dtypes import LONG_NAMES
from moec.errors import IRError
from moec.ir.dims import evaluate_dim
from moec.ir.graph import Attr, DType, Op, Ref, Value

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, long) for name, long in LONG_NAMES.items()
}
IR_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@cache
def overload(name: str) -> Any:
    """The torch operator of an ATen op of the IR, such as "aten.add.Tensor".

    Raises IRError where torch has none of that name.
    """
    namespace, packet, which = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), which)
    except AttributeError:
        raise IRError(f"torch has no operator {name}") from None


def call(op: Op, tensors: Sequence[torch.Tensor], env: Mapping[str, int]) -> tuple[Any, ...]:
    """Run one ATen op on tensors; `env` binds the named sizes of its attributes."""
    args, kwargs = arguments(op, tensors, env)
    result = overload(op.name)(*args, **kwargs)
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def arguments(
    op: Op, tensors: Sequence[Any], env: Mapping[str, int]
) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments of an ATen op, in the order of its schema."""
    referenced = {ref.index for value in op.attrs.values() for ref in _refs(value)}
    positional = iter([t for i, t in enumerate(tensors) if i not in referenced])
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in overload(op.name)._schema.arguments:
        if argument.name in op.attrs:
            value = concrete(op.attrs[argument.name], tensors, env)
        elif "Tensor" in str(argument.type):
            value = next(positional, None)
        elif argument.has_default_value():
            value = argument.default_value
        else:
            raise IRError(f"{op}: {argument.name} is missing")
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def _refs(value: Attr) -> list[Ref]:
    if isinstance(value, tuple):
        return [ref for item in value for ref in _refs(item)]
    return [value] if isinstance(value, Ref) else []


def concrete(value: Attr, tensors: Sequence[Any], env: Mapping[str, int]) -> Any:
    """An attribute as torch takes it: sizes evaluated, dtypes and inputs looked up."""
    match value:
        case Ref(index):
            return tensors[index]
        case DType(name):
            return TORCH_DTYPES[name]
        case tuple():
            return [concrete(item, tensors, env) for item in value]
        case sympy.Expr():
            return evaluate_dim(value, env)
        case _:
            return value


def named(op: Op) -> Mapping[str, Any]:
    """The arguments of an ATen op by schema name: Values, attributes, or the schema's defaults."""
    return _named(op)


@cache
def _schema(name: str) -> tuple[tuple[str, bool, Any], ...]:
    return tuple(
        (a.name, "Tensor" in str(a.type), a.default_value if a.has_default_value() else None)
        for a in overload(name)._schema.arguments
    )


def _named(op: Op) -> dict[str, Any]:
    listed = {ref.index for attr in op.attrs.values() for ref in _refs(attr)}
    positional = iter([v for i, v in enumerate(op.inputs) if i not in listed])
    arguments: dict[str, Any] = {}
    for name, tensor, default in _schema(op.name):
        if name in op.attrs:
            arguments[name] = _resolved(op.attrs[name], op.inputs)
        elif tensor:
            arguments[name] = next(positional, None)
        else:
            arguments[name] = tuple(default) if isinstance(default, list) else default
    if next(positional, None) is not None:
        raise IRError(f"{op}: has more inputs than its schema names")
    return arguments


def _resolved(attr: Attr, inputs: tuple[Value, ...]) -> Any:
    match attr:
        case Ref(index):
            return inputs[index]
        case tuple():
            return tuple(_resolved(item, inputs) for item in attr)
        case _:
            return attr
