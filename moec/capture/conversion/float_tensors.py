"""Floats that are computed of sizes or read from data, as tensors f64[]; conditions as bool[].

    x * (n / 4)    full: f64[] = aten.full.default() <fill_value={n}>
                   full_1: f64[] = aten.full.default() <fill_value=4>
                   div: f64[] = aten.div.Tensor(full, full_1)
                   mul: f32[n] = aten.mul.Tensor(x, div)

Python computes such floats in double precision, and so do these ops. torch treats a tensor without
axes as it treats a Python number, so that the result has the dtype of the other operand.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import sympy
import torch

from moec.ir.aten import IR_DTYPES
from moec.ir.graph import DType, Op, TensorType, Value

_TARGETS: Mapping[Any, str] = {
    operator.add: "aten.add.Tensor",
    operator.sub: "aten.sub.Tensor",
    operator.mul: "aten.mul.Tensor",
    operator.truediv: "aten.div.Tensor",
    operator.pow: "aten.pow.Tensor_Tensor",
    operator.neg: "aten.neg.default",
    torch.sym_sqrt: "aten.sqrt.default",
    torch.sym_max: "aten.maximum.default",
    torch.sym_min: "aten.minimum.default",
}
_CONDITIONS: Mapping[Any, str] = {
    operator.gt: "aten.gt.Tensor",
    operator.ge: "aten.ge.Tensor",
    operator.lt: "aten.lt.Tensor",
    operator.le: "aten.le.Tensor",
    operator.eq: "aten.eq.Tensor",
    operator.ne: "aten.ne.Tensor",
    operator.and_: "aten.logical_and.default",
    operator.or_: "aten.logical_or.default",
    torch.sym_not: "aten.logical_not.default",
}
_F64 = TensorType("f64", ())
_BOOL = TensorType("bool", ())
_CAST = "aten._to_copy.default"
_FILLS = {"aten.scalar_tensor.default": 0, "aten.full.default": 1, "aten.full_like.default": 1}
"""The position of the number in operators that repeat it."""
_WITH_TENSOR = {
    **{
        f"aten.{name}.Scalar": f"aten.{name}.Tensor"
        for name in "gt ge lt le eq ne remainder fmod".split()
    },
    "aten.pow.Tensor_Scalar": "aten.pow.Tensor_Tensor",
}
_CLAMP = "aten.clamp.default"


@dataclass(frozen=True)
class VaryingFloat:
    """A float that depends on sizes or data. `value` is its expression if data are not involved."""

    where: str
    expr: str
    value: sympy.Expr | None = None


@dataclass(frozen=True)
class VaryingCondition(VaryingFloat):
    """A condition that depends on sizes or data. A size that it chooses is none made of floats."""


class Emitter(Protocol):
    """What this file needs of the converter of a graph."""

    ops: list[Op]
    values: dict[torch.fx.Node, Any]
    floats: dict[torch.fx.Node, Value]
    line: str

    def fresh(self, name: str) -> str: ...

    def type(self, tensor: torch.Tensor, where: str) -> TensorType: ...


def operand_for(emitter: Emitter, number: torch.fx.Node, node: torch.fx.Node) -> Value | None:
    """The float `number` as an operand of `node`; None for an operation that has no op.

    It is f64[] beside a tensor of floats that has axes, which decides the dtype of the result. Else
    it has the dtype of the result, because f64[] would make that f64, as a Python number does not;
    a comparison, whose result is bool, takes it in the dtype of a float beside it.
    """
    value = float_tensor(emitter, number)
    operands = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [x for x in operands if isinstance(x, torch.Tensor)]
    if value is None or any(x.ndim and x.dtype.is_floating_point for x in tensors):
        return value
    result: torch.dtype = node.meta["val"].dtype
    if result is torch.bool:
        floats = (x.dtype for x in tensors if x.dtype.is_floating_point)
        result = next(floats, torch.get_default_dtype())
    return cast_to(emitter, value, IR_DTYPES[result])


def emit_call(emitter: Emitter, node: torch.fx.Node) -> Value | None:
    """The result of an operator whose argument that must be a number is a float of sizes or data,
    by an operator that takes tensors; None where there is none."""
    target, arguments = str(node.target), node.args
    result = emitter.type(node.meta["val"], node.name)
    if target in _FILLS:
        value = float_tensor(emitter, cast(torch.fx.Node, arguments[_FILLS[target]]))
        if value is None:
            return None
        value = cast_to(emitter, value, result.dtype)
        return emit_op(emitter, "aten.expand.default", (value,), result, size=result.shape)
    x = emitter.values.get(cast(torch.fx.Node, arguments[0]))
    if target in _WITH_TENSOR and isinstance(x, Value):
        value = operand_for(emitter, cast(torch.fx.Node, arguments[1]), node)
        return value and emit_op(emitter, _WITH_TENSOR[target], (x, value), result)
    if target == _CLAMP and isinstance(x, Value):
        for name, limit in zip(("maximum", "minimum"), arguments[1:], strict=False):
            value = None if limit is None else number_tensor(emitter, limit)
            if limit is not None and value is None:
                return None
            if value is not None:
                value = cast_to(emitter, value, result.dtype)
                x = emit_op(emitter, f"aten.{name}.default", (x, value), result)
        return x
    return None


def float_tensor(emitter: Emitter, node: torch.fx.Node) -> Value | None:
    """The float or condition of a node; None for an operation that has no op. Emits ops once for
    each node."""
    if node not in emitter.floats:
        value = _emit(emitter, node)
        if value is None:
            return None
        emitter.floats[node] = value
    return emitter.floats[node]


def _emit(emitter: Emitter, node: torch.fx.Node) -> Value | None:
    if "_local_scalar_dense" in str(node.target):
        source = emitter.values[node.all_input_nodes[0]]
        scalar = TensorType(source.dtype, ())
        value = emit_op(emitter, "aten.reshape.default", (source,), scalar, shape=())
        return cast_to(emitter, value, "f64")
    if node.target is torch.sym_float:
        return number_tensor(emitter, node.args[0])
    held = emitter.values.get(node)
    if isinstance(held, VaryingFloat) and held.value is not None and held.value.is_integer:
        return number_tensor(emitter, held.value)
    target = _TARGETS.get(node.target, _CONDITIONS.get(node.target))
    operands = [number_tensor(emitter, argument) for argument in node.args]
    if target is None or any(operand is None for operand in operands):
        return None
    result = _BOOL if node.target in _CONDITIONS else _F64
    return emit_op(emitter, target, tuple(x for x in operands if x is not None), result)


def number_tensor(emitter: Emitter, argument: Any) -> Value | None:
    """A size, a constant, or another float, as f64[]."""
    if isinstance(argument, torch.fx.Node):
        value = emitter.values.get(argument)
        if isinstance(value, VaryingFloat):
            return float_tensor(emitter, argument)
        argument = value
    if not isinstance(argument, int | float | sympy.Expr):
        return None
    fill = {"size": (), "fill_value": argument, "dtype": DType("f64")}
    return emit_op(emitter, "aten.full.default", (), _F64, **fill)


def cast_to(emitter: Emitter, value: Value, dtype: str) -> Value:
    if value.dtype == dtype:
        return value
    return emit_op(emitter, _CAST, (value,), TensorType(dtype, value.shape), dtype=DType(dtype))


def emit_op(
    emitter: Emitter, target: str, inputs: tuple[Value, ...], result: TensorType, **attrs: Any
) -> Value:
    output = Value(emitter.fresh(target.split(".")[1].strip("_")), result)
    emitter.ops.append(Op(target, inputs, (output,), attrs, None, "", emitter.line))
    return output
