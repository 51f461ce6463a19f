"""Operators whose factor is a float of sizes or data, as products with tensors.

    torch.add(x, y, alpha=n / 6)    mul: f32[n, d] = aten.mul.Tensor(y, div)
                                    add: f32[n, d] = aten.add.Tensor(x, mul)

These operators take their factor as a number, and a graph stores numbers as constants. In 16 bits
they round once, so the products are computed in f32 and rounded at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from moec.capture.conversion.float_tensors import Emitter, cast_to, emit_op, number_tensor
from moec.ir.graph import TensorType, Value


def emit_scaled(emitter: Emitter, node: torch.fx.Node) -> Value | None:
    """The result of an operator with a float of sizes or data as a factor; None for others."""
    rule = _RULES.get(str(node.target))
    return None if rule is None else rule(emitter, node)


def _sum(emitter: Emitter, node: torch.fx.Node) -> Value | None:
    """x + alpha * other, or the difference."""
    x, other = (_operand(emitter, argument) for argument in node.args[:2])
    alpha = _operand(emitter, node.kwargs.get("alpha", 1))
    if x is None or other is None or alpha is None:
        return None
    result = _result(emitter, node)
    target = str(node.target).replace("Scalar", "Tensor")
    return _rounded(emitter, target, (x, _product(emitter, other, alpha, result)), result)


def _addmm(emitter: Emitter, node: torch.fx.Node) -> Value | None:
    """beta * x + alpha * (a @ b)."""
    x, a, b = (_operand(emitter, argument) for argument in node.args[:3])
    beta, alpha = (_operand(emitter, node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    if x is None or a is None or b is None or beta is None or alpha is None:
        return None
    result = _result(emitter, node)
    total = emit_op(emitter, "aten.mm.default", (a, b), result)
    parts = (_product(emitter, x, beta, result), _product(emitter, total, alpha, result))
    return _rounded(emitter, "aten.add.Tensor", parts, result)


def _leaky_relu(emitter: Emitter, node: torch.fx.Node) -> Value | None:
    """x where x > 0, else slope * x."""
    x, slope = (_operand(emitter, argument) for argument in node.args[:2])
    if x is None or slope is None:
        return None
    result = _result(emitter, node)
    positive = emit_op(emitter, "aten.gt.Scalar", (x,), TensorType("bool", x.shape), other=0)
    scaled = cast_to(emitter, _product(emitter, x, slope, result), result.dtype)
    return emit_op(emitter, "aten.where.self", (positive, x, scaled), result)


_RULES: Mapping[str, Callable[[Emitter, torch.fx.Node], Value | None]] = {
    **{f"aten.{name}.{kind}": _sum for name in ("add", "sub") for kind in ("Tensor", "Scalar")},
    "aten.addmm.default": _addmm,
    "aten.leaky_relu.default": _leaky_relu,
}


def _operand(emitter: Emitter, argument: Any) -> Value | None:
    """A tensor as it is, or a number as f64[]."""
    value = emitter.values.get(argument) if isinstance(argument, torch.fx.Node) else None
    return value if isinstance(value, Value) else number_tensor(emitter, argument)


def _result(emitter: Emitter, node: torch.fx.Node) -> TensorType:
    return emitter.type(cast(torch.Tensor, node.meta["val"]), node.name)


def _wide(result: TensorType) -> str:
    return "f32" if result.dtype in ("bf16", "f16") else result.dtype


def _product(emitter: Emitter, value: Value, factor: Value, result: TensorType) -> Value:
    """value * factor in at least f32. A factor is f64[], which does not change the dtype of a
    tensor with axes."""
    x = cast_to(emitter, value, _wide(result) if value.shape else "f64")
    return emit_op(emitter, "aten.mul.Tensor", (x, factor), x.type)


def _rounded(
    emitter: Emitter, target: str, operands: tuple[Value, ...], result: TensorType
) -> Value:
    wide = TensorType(_wide(result), result.shape)
    scalars = bool(result.shape)  # beside a tensor with axes, f64[] does not change the dtype
    inputs = tuple(
        v if scalars and not v.shape else cast_to(emitter, v, wide.dtype) for v in operands
    )
    return cast_to(emitter, emit_op(emitter, target, inputs, wide), result.dtype)
