"""Calls of ATen ops: inputs and attributes of the IR become the arguments of torch's schema."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import sympy
import torch

from moec.dtypes import LONG_NAMES
from moec.errors import IRError
from moec.ir.graph import Attr, DType, Op, Ref, Value
from moec.ir.sizes.dims import evaluate_dim
from moec.torch_private import schema_of

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, long) for name, long in LONG_NAMES.items()
}
IR_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

VARIANCES = {"aten.var.correction", "aten.std.correction", "aten.var_mean.correction"}
"""Operators that warn about no rows: a graph also computes experts that have none."""


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
    operator = overload(op.name)
    if op.name in VARIANCES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*degrees of freedom is <= 0", UserWarning)
            result = operator(*args, **kwargs)
    else:
        result = operator(*args, **kwargs)
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def arguments(
    op: Op, tensors: Sequence[Any], env: Mapping[str, int]
) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments of an ATen op, in the order of its schema.

    Raises IRError for an argument without a value and without a default.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for keyword, source in _sources(op):
        value = source(tensors, env)
        if keyword:
            kwargs[keyword] = value
        else:
            args.append(value)
    return args, kwargs


_Source = Callable[[Sequence[Any], Mapping[str, int]], Any]
"""An argument as a function of an op's tensors and the named sizes."""


@lru_cache(maxsize=1 << 13)
def _sources(op: Op) -> tuple[tuple[str, _Source], ...]:
    """The source of each argument with its keyword, "" if it is positional. Proofs run an op dozens
    of times, and matching it with its schema takes longer than running it on a few rows."""
    sources: list[tuple[str, _Source]] = []
    positions = _arguments(op, range(len(op.inputs)), _FromAttribute)
    for parameter, argument in zip(_schema(op.name), positions, strict=False):
        if argument is _MISSING:
            raise IRError(f"{op}: {parameter.name} is missing")
        source: _Source
        if isinstance(argument, _FromAttribute) and _varies(argument.value):
            source = partial(resolve_attr, argument.value)
        elif isinstance(argument, _FromAttribute):
            source = _constant(resolve_attr(argument.value, (), {}))
        elif parameter.tensor and argument is not None:
            source = _tensor_at(argument)
        else:
            source = _constant(argument)
        sources.append((parameter.name if parameter.keyword else "", source))
    return tuple(sources)


@dataclass(frozen=True)
class _FromAttribute:
    value: Attr


def _varies(attr: Attr) -> bool:
    if isinstance(attr, tuple):
        return any(map(_varies, attr))
    return isinstance(attr, Ref | sympy.Expr)


def _tensor_at(position: int) -> _Source:
    return lambda tensors, env: tensors[position]


def _constant(value: Any) -> _Source:
    return lambda tensors, env: value


def named(op: Op) -> Mapping[str, Any]:
    """The arguments of an ATen op by schema name: Values, attributes, or the schema's defaults.

    Raises IRError for inputs beyond the schema.
    """
    *values, rest = _arguments(op, op.inputs, lambda attr: _resolved(attr, op.inputs))
    if rest:
        raise IRError(f"{op}: has more inputs than its schema names")
    names = (parameter.name for parameter in _schema(op.name))
    return {name: _plain(value) for name, value in zip(names, values, strict=True)}


def _plain(value: Any) -> Any:
    """A default in the form of an attribute: a tuple for a list, None where there is none."""
    if value is _MISSING:
        return None
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a schema; `tensor` is True if it takes one input or a list of inputs."""

    name: str
    tensor: bool
    keyword: bool
    default: Any


_MISSING = object()


@cache
def _schema(name: str) -> tuple[_Parameter, ...]:
    return tuple(
        _Parameter(
            a.name,
            "Tensor" in str(a.type),
            a.kwarg_only,
            a.default_value if a.has_default_value() else _MISSING,
        )
        for a in schema_of(overload(name)).arguments
    )


def _arguments(op: Op, inputs: Sequence[Any], resolve: Callable[[Attr], Any]) -> Iterator[Any]:
    """The argument of each parameter of the schema: its attribute, the next input that no
    attribute refers to, or the default; finally, the list of remaining inputs."""
    referenced = {ref.index for attr in op.attrs.values() for ref in refs(attr)}
    positional = (value for i, value in enumerate(inputs) if i not in referenced)
    for parameter in _schema(op.name):
        if parameter.name in op.attrs:
            yield resolve(op.attrs[parameter.name])
        elif parameter.tensor:
            yield next(positional, None)
        else:
            yield parameter.default
    yield list(positional)


def refs(attr: Attr) -> list[Ref]:
    """The references to inputs in an attribute, in order."""
    if isinstance(attr, tuple):
        return [ref for item in attr for ref in refs(item)]
    return [attr] if isinstance(attr, Ref) else []


def resolve_attr(value: Attr, tensors: Sequence[Any], env: Mapping[str, int]) -> Any:
    """An attribute in torch's form: sizes evaluated, dtypes and inputs looked up."""
    match value:
        case Ref(index):
            return tensors[index]
        case DType(name):
            return TORCH_DTYPES[name]
        case tuple():
            return [resolve_attr(item, tensors, env) for item in value]
        case sympy.Expr():
            return evaluate_dim(value, env)
        case _:
            return value


def _resolved(attr: Attr, inputs: tuple[Value, ...]) -> Any:
    match attr:
        case Ref(index):
            return inputs[index]
        case tuple():
            return tuple(_resolved(item, inputs) for item in attr)
        case _:
            return attr
