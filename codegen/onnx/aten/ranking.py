"""Greatest, least and sorted elements. As in torch, NaN is above every number, and the greatest and
the least of elements with a NaN are NaN; ONNX defines no order of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.codegen.onnx.rules import Call, axis, build
from moec.codegen.onnx.writer import NodeWriter
from moec.dtypes import FLOATS, HALVES
from moec.ir.graph import Value

_FINFO = {"f32": torch.finfo(torch.float32), "f64": torch.finfo(torch.float64)}


def ranked_dtype(dtype: str) -> str:
    """The dtype in which elements are compared: one of those that all operators support, and that
    holds every element exactly."""
    if dtype in HALVES:
        return "f32"
    return dtype if dtype in ("f32", "f64", "i64") else "i32"


def top(
    w: NodeWriter, x: str, dtype: str, k: str, *, dim: int = -1, largest: bool = True
) -> tuple[str, str]:
    """(values, positions) of the k (i64[1]) greatest or least elements along an axis, in order; of
    equal elements the lower position comes first. `x` is of a `ranked_dtype`."""
    if dtype not in FLOATS:
        values, positions = w.many("TopK", [x, k], 2, axis=dim, largest=int(largest))
    else:
        key = _key(w, x, dtype, above=True)
        positions = w.many("TopK", [key, k], 2, axis=dim, largest=int(largest))[1]
        values = w("GatherElements", x, positions, axis=dim)
    return values, positions


def reduced_extreme(w: NodeWriter, kind: str, x: str, dtype: str, dims: str, keep: int) -> str:
    """ReduceMax or ReduceMin (`kind`) over the axes `dims`. `x` is of a `ranked_dtype`."""
    extreme = w(kind, x, dims, keepdims=keep)
    if dtype not in FLOATS:
        return extreme
    marks = w.cast(w("IsNaN", x), "bool", "i32")
    any_nan = w.cast(w("ReduceMax", marks, dims, keepdims=keep), "i32", "bool")
    return w("Where", any_nan, w.constant(float("nan"), dtype), extreme)


def _key(w: NodeWriter, x: str, dtype: str, *, above: bool) -> str:
    """`x` with infinity for NaN: plus infinity `above` all numbers, else minus infinity below them.
    An infinity of that sign becomes the extreme finite number."""
    if dtype not in FLOATS:
        return x
    limit = _FINFO[dtype].max if above else _FINFO[dtype].min
    finite = w("Min" if above else "Max", x, w.constant(limit, dtype))
    return w("Where", w("IsNaN", x), w.constant(float("inf") * (1 if above else -1), dtype), finite)


@build("amax", "max", "amin", "min")
def reduced(c: Call) -> str:
    value: Value = c["self"]
    rank, dtype = len(value.shape), ranked_dtype(value.dtype)
    if not rank:
        return c.read(value)
    dims, keep = [], 0
    if c.op.name not in ("aten.max.default", "aten.min.default"):
        dims, keep = [axis(d, rank) for d in c["dim"]], int(c["keepdim"])
    axes = c.w.constant(dims or list(range(rank)))
    kind = "ReduceMax" if "max" in c.op.name else "ReduceMin"
    output = reduced_extreme(c.w, kind, c.read(value, dtype), dtype, axes, keep)
    return c.w.cast(output, dtype, c.out.dtype)


@build("argmax", "argmin")
def arg(c: Call) -> str:
    value: Value = c["self"]
    x = c.read(value, ranked_dtype(value.dtype))
    if c["dim"] is None:
        return _position(c, c.w("Reshape", x, c.w.constant([-1])), 0, 0)
    return _position(c, x, axis(c["dim"], len(value.shape)), int(c["keepdim"]))


def _position(c: Call, x: str, dim: int, keep: int) -> str:
    """The first position of the greatest or the least element of c's tensor, which is `x`."""
    greatest = "max" in c.op.name
    key = _key(c.w, x, ranked_dtype(c["self"].dtype), above=greatest)
    return c.w("ArgMax" if greatest else "ArgMin", key, axis=dim, keepdims=keep)


@build("max.dim", "min.dim")
def extreme(c: Call) -> Sequence[str]:
    value: Value = c["self"]
    dtype = ranked_dtype(value.dtype)
    dim, x = axis(c["dim"], len(value.shape)), c.read(value, dtype)
    positions = _position(c, x, dim, 1)
    values = c.w.cast(c.w("GatherElements", x, positions, axis=dim), dtype, value.dtype)
    results = (values, positions)
    if c["keepdim"]:
        return results
    return [c.w("Squeeze", result, c.w.constant([dim])) for result in results]


@build("topk")
def topk(c: Call) -> Sequence[str]:
    return _top(c, c["k"], bool(c["largest"]))


@build("sort", "sort.stable", "argsort", "argsort.stable")
def sort(c: Call) -> Sequence[str]:
    """A stable sort is the TopK of all elements."""
    value: Value = c["self"]
    dim = axis(c["dim"], len(value.shape))
    values, order = _top(c, value.shape[dim], bool(c["descending"]))
    return [order] if "argsort" in c.op.name else [values, order]


def _top(c: Call, k: object, largest: bool) -> tuple[str, str]:
    value: Value = c["self"]
    dtype, dim = ranked_dtype(value.dtype), axis(c["dim"], len(value.shape))
    x = c.read(value, dtype)
    values, positions = top(c.w, x, dtype, c.w.dim(k), dim=dim, largest=largest)
    return c.w.cast(values, dtype, value.dtype), positions
