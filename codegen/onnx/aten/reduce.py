"""Sums, means, softmax, layer norms, cumulative sums."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from moec.codegen.onnx.rules import Call, axis, build
from moec.errors import NoMatch
from moec.ir.graph import Value


def _axes(c: Call, dims: Any) -> list[int]:
    """The reduced axes; None or an empty list means all."""
    rank = len(c["self"].shape)
    if dims is None or (isinstance(dims, tuple | list) and not dims):
        return list(range(rank))
    return [axis(d, rank) for d in (dims if isinstance(dims, tuple | list) else (dims,))]


def _argument(c: Call, name: str, default: Any) -> Any:
    try:
        return c[name]
    except KeyError:
        return default


def _reduced(kind: str, c: Call, x: str) -> str:
    dims = _axes(c, _argument(c, "dim", None))
    if not dims:  # a tensor of one element
        return x
    keep = int(bool(_argument(c, "keepdim", False)))
    return c.w(kind, x, c.w.constant(dims), keepdims=keep)


def _reduce(kind: str, c: Call) -> str:
    return _reduced(kind, c, c.read(c["self"], c.out.dtype))


for _kind, _names in {
    "ReduceSum": ("sum", "sum.dim_IntList"),
    "ReduceProd": ("prod", "prod.dim_int"),
    "ReduceLogSumExp": ("logsumexp",),
}.items():
    build(*_names)(partial(_reduce, _kind))


@build("mean", "mean.dim")
def mean(c: Call) -> str:
    """Of no elements it is NaN; ReduceMean gives 0 in ONNX Runtime."""
    value: Value = c["self"]
    x = c.read(value, c.out.dtype)
    sizes = [value.shape[d] for d in _axes(c, _argument(c, "dim", None))]
    if all(isinstance(size, int) and size for size in sizes):
        return _reduced("ReduceMean", c, x)
    count = c.w.cast(c.w.scalar(math.prod(sizes)), "i64", c.out.dtype)
    return c.w("Div", _reduced("ReduceSum", c, x), count)


@build("any", "any.dim", "any.dims", "all", "all.dim", "all.dims")
def truth(c: Call) -> str:
    """With numbers: `any` is the maximum of 0 and 1, `all` the minimum."""
    value: Value = c["self"]
    x = c.w.cast(c.read(value, "bool"), "bool", "i32")
    kind = "ReduceMax" if ".any." in c.op.name else "ReduceMin"
    return c.w.cast(_reduced(kind, c, x), "i32", c.out.dtype)


@build("softmax.int", "_softmax", "log_softmax.int", "_log_softmax")
def softmax(c: Call) -> str:
    value: Value = c["self"]
    kind = "LogSoftmax" if "log_softmax" in c.op.name else "Softmax"
    return c.w(kind, c.read(value, c.out.dtype), axis=axis(c["dim"], len(value.shape)))


@build("cumsum")
def cumsum(c: Call) -> str:
    value: Value = c["self"]
    dtype = "i64" if c.out.dtype == "bool" else c.out.dtype
    dim = c.w.constant(axis(c["dim"], len(value.shape)))
    return c.w("CumSum", c.read(value, dtype), dim)


@build("layer_norm")
def layer_norm(c: Call) -> str:
    value: Value = c["input"]
    shape, dtype = tuple(c["normalized_shape"]), c.out.dtype
    if not all(isinstance(size, int) for size in shape):
        raise NoMatch("operator aten.layer_norm.default over a size that varies has no ONNX form")
    weight = c["weight"]
    scale = c.read(weight, dtype) if weight is not None else c.w.constant([1.0] * shape[-1], dtype)
    inputs = [c.read(value), scale]
    if c["bias"] is not None:
        inputs.append(c.read(c["bias"], dtype))
    return c.w("LayerNormalization", *inputs, axis=-len(shape), epsilon=float(c["eps"]))
