"""The operators of ONNX in those of torch.

A function gets a node's attributes and its inputs, and returns its outputs. The texts of the
operators are those of the ONNX standard, opset 13 to 23 (https://onnx.ai/onnx/operators).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.sources.onnx.sizes import ARITHMETIC, Value, compute, is_sizes, size, sizes, tensor

Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[..., Any]

OPERATORS: dict[str, Operator] = {}
"""By name, with the domain before it where that is not ONNX's own."""


def _operator(*names: str) -> Callable[[Operator], Operator]:
    def add(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return add


def _on_tensors(function: Callable[..., Any]) -> Operator:
    return lambda attributes, *inputs: function(*map(tensor, inputs))


POINTWISE: dict[str, Callable[..., Any]] = {
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Exp": torch.exp,
    "Log": torch.log,
    "Erf": torch.erf,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "Softplus": F.softplus,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Sign": torch.sign,
    "Not": torch.logical_not,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "IsNaN": torch.isnan,
    "MatMul": torch.matmul,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "com.microsoft.QuickGelu": lambda x: x * torch.sigmoid(1.702 * x),
    "com.microsoft.FastGelu": lambda x, *bias: F.gelu(sum(bias, x), approximate="tanh"),
}
OPERATORS |= {name: _on_tensors(function) for name, function in POINTWISE.items()}


_SCALARS = ("Add", "Sub", "Mul", "Equal")
"""Operators of torch that take a number beside a tensor and keep the tensor's dtype, int64."""
_COMMUTE = ("Add", "Mul", "Equal")


def _arithmetic(name: str) -> Operator:
    def divide(a: Tensor, b: Tensor) -> Tensor:
        return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")

    functions: dict[str, Callable[..., Tensor]] = {
        "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": divide, "Equal": torch.eq,
        "Max": torch.maximum, "Min": torch.minimum,
    }  # fmt: skip

    def run(attributes: Attributes, first: Value, *others: Value) -> Value:
        if all(map(is_sizes, (first, *others))) and others:
            result = first
            for other in others:
                result = compute(name, (result, other))
            return result
        if is_sizes(first) and not isinstance(first, list) and name in _COMMUTE:
            first, others = others[0], (first, *others[1:])
        total = tensor(first)
        for value in others:
            scalar = is_sizes(value) and len(sizes(value)) == 1 and total.ndim > 0
            other = size(value) if scalar and name in _SCALARS else tensor(value)
            if name == "Mod":
                total = torch.fmod(total, other) if attributes.get("fmod") else total % other
            else:
                total = functions[name](total, other)
        return total

    return run


OPERATORS |= {name: _arithmetic(name) for name in ARITHMETIC}


@_operator("Identity", "Dropout")
def _identity(attributes: Attributes, x: Value, *rest: Value) -> Value:
    return x


@_operator("Sum")
def _sum(attributes: Attributes, *inputs: Value) -> Tensor:
    return sum(map(tensor, inputs[1:]), tensor(inputs[0]))


@_operator("Cast")
def _cast(attributes: Attributes, x: Value) -> Value:
    dtype = dtype_of(attributes["to"])
    integers = (torch.int64, torch.int32)
    return x if is_sizes(x) and dtype in integers else tensor(x).to(dtype)


@_operator("CastLike")
def _cast_like(attributes: Attributes, x: Value, like: Value) -> Tensor:
    return tensor(x).to(tensor(like).dtype)


@_operator("Gelu", "com.microsoft.Gelu")
def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=_text(attributes.get("approximate", "none")))


@_operator("LeakyRelu")
def _leaky_relu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.leaky_relu(x, attributes.get("alpha", 0.01))


@_operator("Elu")
def _elu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, attributes.get("alpha", 1.0))


@_operator("HardSigmoid")
def _hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    alpha, beta = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))
    return (alpha * x + beta).clamp(0, 1)


@_operator("Clip")
def _clip(attributes: Attributes, x: Tensor, low: Value = None, high: Value = None) -> Tensor:
    x = x if low is None else torch.maximum(x, tensor(low))
    return x if high is None else torch.minimum(x, tensor(high))


@_operator("Where")
def _where(attributes: Attributes, condition: Value, x: Value, y: Value) -> Value:
    if isinstance(condition, bool | torch.SymBool):
        return x if condition else y
    if isinstance(condition, list):  # of sizes: -1 in a shape
        pairs = [sizes(v) * (len(condition) if len(sizes(v)) == 1 else 1) for v in (x, y)]
        return [a if c else b for c, a, b in zip(condition, *pairs, strict=True)]
    return torch.where(tensor(condition), tensor(x), tensor(y))


@_operator("Softmax", "LogSoftmax")
def _softmax(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.softmax(x, attributes.get("axis", -1))


OPERATORS["LogSoftmax"] = lambda attributes, x: torch.log_softmax(x, attributes.get("axis", -1))


@_operator("Gemm")
def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = float(attributes.get("alpha", 1.0)), float(attributes.get("beta", 1.0))
    a = a.T if attributes.get("transA") else a
    weight = b if attributes.get("transB") else b.T
    if alpha == beta == 1 and (c is None or c.ndim == 1):
        return F.linear(a, weight, c)
    y = alpha * F.linear(a, weight)
    return y if c is None else y + beta * c


@_operator("com.microsoft.FusedMatMul")
def _fused_matmul(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    a = a.mT if attributes.get("transA") else a
    b = b.mT if attributes.get("transB") else b
    return float(attributes.get("alpha", 1.0)) * (a @ b)


@_operator("Einsum")
def _einsum(attributes: Attributes, *inputs: Tensor) -> Tensor:
    return torch.einsum(_text(attributes["equation"]), *inputs)


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceSum": torch.sum,
    "ReduceMean": torch.mean,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL2": lambda x, dim, keepdim: x.square().sum(dim, keepdim).sqrt(),
    "ReduceSumSquare": lambda x, dim, keepdim: x.square().sum(dim, keepdim),
    "ReduceLogSumExp": torch.logsumexp,
}


def _reduction(function: Callable[..., Tensor]) -> Operator:
    def run(attributes: Attributes, x: Value, axes: Value = None) -> Tensor:
        data = tensor(x)
        named = attributes.get("axes") if axes is None else sizes(axes)
        if not named and attributes.get("noop_with_empty_axes"):
            return data
        dims = list(named or range(data.ndim))
        return function(data, dim=dims, keepdim=bool(attributes.get("keepdims", 1)))

    return run


OPERATORS |= {name: _reduction(function) for name, function in _REDUCTIONS.items()}


@_operator("ReduceProd")
def _product(attributes: Attributes, x: Value, axes: Value = None) -> Value:
    if is_sizes(x):
        total: Any = 1
        for each in sizes(x):
            total = total * each
        return total if not attributes.get("keepdims", 1) else [total]
    axis = size(list(attributes["axes"]) if axes is None else axes)
    return torch.prod(tensor(x), axis, keepdim=bool(attributes.get("keepdims", 1)))


@_operator("ArgMax")
def _argmax(attributes: Attributes, x: Tensor) -> Tensor:
    if attributes.get("select_last_index"):
        raise NotImplementedError("ArgMax of the last of equal values")
    return x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@_operator("TopK")
def _topk(attributes: Attributes, x: Tensor, k: Value) -> Sequence[Tensor]:
    ordered, largest = (bool(attributes.get(name, 1)) for name in ("sorted", "largest"))
    return torch.topk(x, size(k), attributes.get("axis", -1), largest, ordered)


@_operator("CumSum")
def _cumsum(attributes: Attributes, x: Value, axis: Value) -> Tensor:
    if attributes.get("reverse") or attributes.get("exclusive"):
        raise NotImplementedError("CumSum in reverse, or exclusive")
    return torch.cumsum(tensor(x), size(axis), dtype=tensor(x).dtype)


@_operator("LayerNormalization")
def _layer_norm(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    shape = x.shape[attributes.get("axis", -1) :]
    return F.layer_norm(x, shape, scale, bias, attributes.get("epsilon", 1e-5))


@_operator("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(attributes: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    shape = x.shape[attributes.get("axis", -1) :]
    return F.rms_norm(x, shape, scale, attributes.get("epsilon", 1e-5))


@_operator("BatchNormalization")
def _batch_norm(attributes: Attributes, x: Tensor, *weights: Tensor) -> Tensor:
    scale, bias, mean, var = weights
    return F.batch_norm(x, mean, var, scale, bias, eps=attributes.get("epsilon", 1e-5))


@_operator("Conv")
def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = x.ndim - 2
    pads = attributes.get("pads", [0] * 2 * axes)
    if _text(attributes.get("auto_pad", "NOTSET")) != "NOTSET":
        raise NotImplementedError("Conv with auto_pad")
    around = [pads[i + side * axes] for i in reversed(range(axes)) for side in (0, 1)]
    padded = F.pad(x, around) if any(around) else x
    strides, dilations = (attributes.get(n, [1] * axes) for n in ("strides", "dilations"))
    function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    return cast(
        Tensor,
        function(padded, weight, bias, strides, 0, dilations, attributes.get("group", 1)),
    )


def dtype_of(number: int) -> torch.dtype:
    """The dtype of a number of ONNX's TensorProto.DataType."""
    names = {
        1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
        10: "float16", 11: "float64", 16: "bfloat16",
    }  # fmt: skip
    if number not in names:
        raise NotImplementedError(f"elements of type {number}")
    dtype: torch.dtype = getattr(torch, names[number])
    return dtype


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
