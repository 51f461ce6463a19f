"""Sums, means, extremes, softmax, layer norms, cumulative sums, ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    "ReduceMax": ("amax", "max"),
    "ReduceMin": ("amin", "min"),
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


@build("argmax", "argmin")
def arg(c: Call) -> str:
    value: Value = c["self"]
    kind = "ArgMax" if "argmax" in c.op.name else "ArgMin"
    if c["dim"] is None:
        flat = c.w("Reshape", c.read(value), c.w.constant([-1]))
        return c.w(kind, flat, axis=0, keepdims=0)
    dim, keep = axis(c["dim"], len(value.shape)), int(c["keepdim"])
    return c.w(kind, c.read(value), axis=dim, keepdims=keep)


@build("max.dim", "min.dim")
def extreme(c: Call) -> Sequence[str]:
    value: Value = c["self"]
    dim, keep = axis(c["dim"], len(value.shape)), int(c["keepdim"])
    kind, x = ("Max" if ".max." in c.op.name else "Min"), c.read(value)
    values = c.w(f"Reduce{kind}", x, c.w.constant([dim]), keepdims=keep)
    return values, c.w(f"Arg{kind}", x, axis=dim, keepdims=keep)


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


@build("topk")
def topk(c: Call) -> Sequence[str]:
    value: Value = c["self"]
    dim = axis(c["dim"], len(value.shape))
    order: dict[str, Any] = {"largest": int(c["largest"]), "sorted": int(c["sorted"])}
    return c.w.many("TopK", [c.read(value), c.w.dim(c["k"])], 2, axis=dim, **order)


@build("sort", "sort.stable", "argsort", "argsort.stable")
def sort(c: Call) -> Sequence[str]:
    """TopK of all elements: of equal ones the lower position comes first, as in a stable sort."""
    value: Value = c["self"]
    dim = axis(c["dim"], len(value.shape))
    dtype = value.dtype if value.dtype in ("f32", "f64", "i64", "i32") else "i32"
    every = [c.read(value, dtype), c.w.dim(value.shape[dim])]
    values, order = c.w.many("TopK", every, 2, axis=dim, largest=int(c["descending"]))
    return [order] if "argsort" in c.op.name else [c.w.cast(values, dtype, value.dtype), order]
