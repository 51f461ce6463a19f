"""The operators of ONNX that arrange elements: shapes, slices, gathers and scatters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.sources.onnx.operators import Attributes, Operator, dtype_of
from moec.sources.onnx.sizes import Value, is_number, is_sizes, size, sizes, tensor

ENDLESS = 2**31 - 1
"""From here on the end of a slice is that of the axis."""


def _axes(attributes: Attributes, axes: Value) -> list[Any]:
    return list(attributes.get("axes", ())) if axes is None else sizes(axes)


def _shape(attributes: Attributes, x: Value) -> list[Any]:
    shape = list(tensor(x).shape)
    return shape[attributes.get("start", 0) : attributes.get("end")]


def _reshape(attributes: Attributes, x: Value, shape: Value) -> Value:
    if is_sizes(x):
        target = sizes(shape)
        return sizes(x) if len(target) == 1 else size(x)
    data = tensor(x)
    zeros = not attributes.get("allowzero")
    copied = [
        data.shape[i] if zeros and is_number(s) and s == 0 else s
        for i, s in enumerate(sizes(shape))
    ]
    return data.reshape(copied)


def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(*attributes.get("perm", range(x.ndim - 1, -1, -1)))


def _unsqueeze(attributes: Attributes, x: Value, axes: Value = None) -> Value:
    where = _axes(attributes, axes)
    if is_sizes(x) and not isinstance(x, list) and len(where) == 1:
        return [x]
    data = tensor(x)
    for axis in sorted(axis % (data.ndim + len(where)) for axis in where):
        data = data.unsqueeze(axis)
    return data


def _squeeze(attributes: Attributes, x: Value, axes: Value = None) -> Value:
    if is_sizes(x):
        return size(x)
    where = _axes(attributes, axes)
    data = tensor(x)
    return data.squeeze(tuple(where)) if where else data.squeeze()


def _concat(attributes: Attributes, *inputs: Value) -> Value:
    if all(map(is_sizes, inputs)):
        return [each for value in inputs for each in sizes(value)]
    return torch.cat([tensor(value) for value in inputs], attributes["axis"])


def _split(attributes: Attributes, x: Tensor, parts: Value = None) -> Sequence[Tensor]:
    axis = attributes.get("axis", 0)
    lengths = attributes.get("split") if parts is None else sizes(parts)
    if lengths is not None:
        return torch.split(x, list(lengths), axis)
    count = attributes.get("num_outputs", attributes[OUTPUTS])
    return torch.split(x, -(-x.shape[axis] // count), axis)


def _slice(attributes: Attributes, x: Value, *bounds: Value) -> Value:
    if bounds:
        starts, ends = sizes(bounds[0]), sizes(bounds[1])
        rest = [None if value is None else sizes(value) for value in (*bounds[2:], None, None)]
        axes, steps = rest[0] or list(range(len(starts))), rest[1] or [1] * len(starts)
    else:
        starts, ends = list(attributes["starts"]), list(attributes["ends"])
        axes, steps = list(attributes.get("axes", range(len(starts)))), [1] * len(starts)
    if is_sizes(x):
        return sizes(x)[starts[0] : ends[0] : steps[0]]
    data = tensor(x)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if is_number(step) and step < 0:
            raise NotImplementedError("Slice with a negative step")
        endless = is_number(end) and end >= ENDLESS
        index: list[Any] = [slice(None)] * data.ndim
        index[axis] = slice(start, None if endless else end, step)
        data = data[tuple(index)]
    return data


def _gather(attributes: Attributes, x: Value, ids: Value) -> Value:
    if is_sizes(x) and is_sizes(ids):
        values = sizes(x)
        return [values[i] for i in ids] if isinstance(ids, list) else values[size(ids)]
    data, axis = tensor(x), attributes.get("axis", 0)
    if is_sizes(ids) and not isinstance(ids, list):
        return data.select(axis, size(ids))
    rows = tensor(ids)
    if axis == 0 and data.ndim == 2 and rows.ndim > 0 and isinstance(x, torch.nn.Parameter):
        return F.embedding(rows, data)
    axis %= data.ndim
    picked = data.index_select(axis, rows.reshape(-1))
    return picked.reshape(*data.shape[:axis], *rows.shape, *data.shape[axis + 1 :])


def _gather_elements(attributes: Attributes, x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, attributes.get("axis", 0), ids)


def _gather_nd(attributes: Attributes, x: Tensor, ids: Tensor) -> Tensor:
    if attributes.get("batch_dims"):
        raise NotImplementedError("GatherND with batch axes")
    return x[tuple(ids.unbind(-1))]


def _scatter_elements(attributes: Attributes, x: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    reduction = _reduction(attributes)
    axis = attributes.get("axis", 0)
    if reduction == "none":
        return x.scatter(axis, ids, values)
    if reduction == "add":
        return x.scatter_add(axis, ids, values)
    raise NotImplementedError(f"ScatterElements with {reduction}")


def _scatter_nd(attributes: Attributes, x: Tensor, ids: Value, values: Tensor) -> Tensor:
    reduction, rows = _reduction(attributes), tensor(ids).unbind(-1)
    if reduction not in ("none", "add"):
        raise NotImplementedError(f"ScatterND with {reduction}")
    return x.index_put(rows, values, accumulate=reduction == "add")


def _reduction(attributes: Attributes) -> str:
    value = attributes.get("reduction", "none")
    return value.decode() if isinstance(value, bytes) else str(value)


def _expand(attributes: Attributes, x: Value, wide: Value) -> Value:
    target = sizes(wide)
    if is_sizes(x) and len(target) == 1 and is_number(target[0]):
        return sizes(x) * (target[0] if len(sizes(x)) == 1 else 1)
    data = tensor(x)
    missing = data.ndim - len(target)
    target = [*[1] * missing, *target] if missing > 0 else target
    shape = [1] * (len(target) - data.ndim) + list(data.shape)
    lengths = [s if is_number(t) and t == 1 else t for s, t in zip(shape, target, strict=True)]
    return data.expand(lengths)


def _tile(attributes: Attributes, x: Tensor, repeats: Value) -> Tensor:
    return x.repeat(*sizes(repeats))


def _pad(
    attributes: Attributes, x: Tensor, pads: Value, value: Value = None, axes: Value = None
) -> Tensor:
    mode = attributes.get("mode", b"constant")
    if mode not in (b"constant", "constant"):
        raise NotImplementedError(f"Pad with {mode!r}")
    sides = sizes(pads)
    where = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in sizes(axes)]
    around = [0] * (2 * x.ndim)
    for number, axis in enumerate(where):
        last = x.ndim - 1 - axis
        around[2 * last], around[2 * last + 1] = sides[number], sides[number + len(where)]
    return F.pad(x, around, value=0 if value is None else float(tensor(value)))


def _constant_of_shape(attributes: Attributes, shape: Value) -> Value:
    number, dtype = attributes.get(VALUE, (0.0, torch.float32))
    target = sizes(shape)
    if dtype == torch.int64 and len(target) == 1 and is_number(target[0]):
        return [number] * target[0]
    return torch.full(tuple(target), number, dtype=dtype)


def _range(attributes: Attributes, start: Value, end: Value, step: Value) -> Tensor:
    if all(map(is_sizes, (start, end, step))):
        return torch.arange(size(start), size(end), size(step))
    first, last, by = (tensor(value).item() for value in (start, end, step))
    return torch.arange(first, last, by, dtype=tensor(start).dtype)


def _one_hot(attributes: Attributes, chosen: Value, depth: Value, values: Value) -> Value:
    count = size(depth if is_sizes(depth) else int(tensor(depth)))
    if is_sizes(chosen) and is_sizes(values):  # repeats of each axis: one row, without its axis
        off, on = sizes(values)
        return [on if axis == size(chosen) % count else off for axis in range(count)]
    ids, values = tensor(chosen), tensor(values)
    if attributes.get("axis", -1) not in (-1, ids.ndim):
        raise NotImplementedError("OneHot along an axis that is not the last")
    positions = torch.where(ids < 0, ids + count, ids)
    hot = positions[..., None] == torch.arange(count)
    return torch.where(hot, values[1], values[0])


def _trilu(attributes: Attributes, x: Tensor, k: Value = None) -> Tensor:
    diagonal = 0 if k is None else size(k)
    return x.triu(diagonal) if attributes.get("upper", 1) else x.tril(diagonal)


def _nonzero(attributes: Attributes, x: Value) -> Tensor:
    return torch.nonzero(tensor(x)).T


OUTPUTS, VALUE = "number of outputs", "value"
LAYOUT: dict[str, Operator] = {
    "Shape": _shape,
    "Size": lambda attributes, x: tensor(x).numel(),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "OneHot": _one_hot,
    "Trilu": _trilu,
    "NonZero": _nonzero,
    "EyeLike": lambda attributes, x: torch.eye(*x.shape, dtype=dtype_of(attributes["dtype"])),
}
