"""Ops that move or create elements: shapes, slices, joins, constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.codegen.onnx.rules import Call, axis, build
from moec.codegen.onnx.writer import NUMPY
from moec.errors import NoMatch
from moec.ir.graph import Value
from moec.ir.sizes.dims import Dim, symbols

LAST = np.iinfo(np.int64).max


@build(
    "reshape", "view", "view_copy", "_unsafe_view", "unsqueeze", "unsqueeze_copy", "squeeze",
    "squeeze.dim", "squeeze.dims", "flatten.using_ints", "unflatten.int",
)  # fmt: skip
def reshape(c: Call) -> str:
    return c.reshaped(c["self"], c.out.shape)


@build("permute", "permute_copy", "transpose.int", "t", "mT", "numpy_T")
def permute(c: Call) -> str:
    value: Value = c["self"]
    rank = len(value.shape)
    dims = list(range(rank))
    match c.op.name:
        case "aten.permute.default" | "aten.permute_copy.default":
            dims = [axis(d, rank) for d in c["dims"]]
        case "aten.transpose.int":
            a, b = axis(c["dim0"], rank), axis(c["dim1"], rank)
            dims[a], dims[b] = dims[b], dims[a]
        case "aten.mT.default":
            dims[-2:] = dims[:-3:-1]
        case _:
            dims.reverse()
    return c.w("Transpose", c.read(value), perm=dims)


@build("expand", "expand_copy", "broadcast_to", "expand_as")
def expand(c: Call) -> str:
    return c.expanded(c.read(c["self"]), c["self"].shape, c.out.shape)


def sliced(c: Call, x: str, dim: int, start: Any, end: Any, step: int = 1) -> str:
    w = c.w
    return w("Slice", x, w.dim(start), w.dim(end), w.constant([dim]), w.constant([step]))


@build("slice.Tensor", "slice_copy.Tensor", "narrow")
def slice_(c: Call) -> str:
    value: Value = c["self"]
    dim = axis(c["dim"], len(value.shape))
    if c.op.name == "aten.narrow.default":
        return sliced(c, c.read(value), dim, c["start"], c["start"] + c["length"])
    start, end, step = _range(c, value.shape[dim])
    return sliced(c, c.read(value), dim, start, end, step)


def _range(c: Call, size: Dim) -> tuple[Any, Any, int]:
    start = 0 if c["start"] is None else c["start"]
    end = LAST if c["end"] is None else c["end"]
    return start, end, c["step"]


@build("select.int", "select_copy.int")
def select(c: Call) -> str:
    value: Value = c["self"]
    return c.w(
        "Gather", c.read(value), c.w.scalar(c["index"]), axis=axis(c["dim"], len(value.shape))
    )


@build("cat", "concat", "concatenate")
def cat(c: Call) -> str:
    parts: Sequence[Value] = [v for v in c["tensors"] if v.shape != (0,)]
    names = [c.read(v, c.out.dtype) for v in parts]
    if len(names) == 1:
        return names[0]
    return c.w("Concat", *names, axis=axis(c["dim"], len(c.out.shape)))


@build("stack")
def stack(c: Call) -> str:
    dim = axis(c["dim"], len(c.out.shape))
    at = c.w.constant([dim])
    names = [c.w("Unsqueeze", c.read(v, c.out.dtype), at) for v in c["tensors"]]
    return c.w("Concat", *names, axis=dim)


@build("split_with_sizes", "split.Tensor", "chunk", "tensor_split.sections")
def split(c: Call) -> Sequence[str]:
    value: Value = c["self"]
    dim = axis(c["dim"], len(value.shape))
    sizes = c.w.shape([out.shape[dim] for out in c.op.outputs])
    if len(c.op.outputs) == 1:
        return [c.read(value)]
    return c.w.many("Split", [c.read(value), sizes], len(c.op.outputs), axis=dim)


@build("unbind.int")
def unbind(c: Call) -> Sequence[str]:
    value: Value = c["self"]
    dim = axis(c["dim"], len(value.shape))
    return [
        c.w("Gather", c.read(value), c.w.constant(i), axis=dim) for i in range(len(c.op.outputs))
    ]


@build("slice_scatter")
def slice_scatter(c: Call) -> str:
    """The source between the parts of the value before and after it."""
    value, source = c["self"], c["src"]
    dim = axis(c["dim"], len(value.shape))
    start, end, step = _range(c, value.shape[dim])
    if step != 1:
        raise NoMatch("operator aten.slice_scatter.default with a step has no ONNX form")
    size = value.shape[dim]
    to_end = isinstance(end, int) and (end == LAST or (isinstance(size, int) and end >= size))
    parts = [c.read(source, c.out.dtype)]
    if start != 0:
        parts.insert(0, sliced(c, c.read(value), dim, 0, start))
    if not to_end and end != size:
        parts.append(sliced(c, c.read(value), dim, end, LAST))
    return parts[0] if len(parts) == 1 else c.w("Concat", *parts, axis=dim)


@build("select_scatter")
def select_scatter(c: Call) -> str:
    value, source = c["self"], c["src"]
    dim, index = axis(c["dim"], len(value.shape)), c["index"]
    row = c.w("Unsqueeze", c.read(source, c.out.dtype), c.w.constant([dim]))
    x = c.read(value)
    if isinstance(index, int) and index < 0:
        index = value.shape[dim] + index
    before, after = sliced(c, x, dim, 0, index), sliced(c, x, dim, index + 1, LAST)
    return c.w("Concat", before, row, after, axis=dim)


@build("repeat")
def repeat(c: Call) -> str:
    value: Value = c["self"]
    new = len(c["repeats"]) - len(value.shape)
    x = c.reshaped(value, (*(1,) * new, *value.shape)) if new else c.read(value)
    return c.w("Tile", x, c.w.shape(c["repeats"]))


@build("flip")
def flip(c: Call) -> str:
    x, w = c.read(c["self"]), c.w
    for dim in c["dims"]:
        at = [axis(dim, len(c.out.shape))]
        ends = [w.constant([-1]), w.constant([-LAST]), w.constant(at), w.constant([-1])]
        x = w("Slice", x, *ends)
    return x


@build("constant_pad_nd")
def pad(c: Call) -> str:
    rank, amounts = len(c.out.shape), c["pad"]
    before, after = [0] * rank, [0] * rank
    for pair in range(len(amounts) // 2):
        before[-1 - pair], after[-1 - pair] = amounts[2 * pair : 2 * pair + 2]
    value = c.w.constant(c["value"] or 0, c.out.dtype)
    return c.w("Pad", c.read(c["self"]), c.w.shape([*before, *after]), value)


# ---- constants -------------------------------------------------------------------------


def filled(c: Call, value: Any) -> str:
    """A tensor of the result's shape, filled with one number."""
    if not c.out.shape:
        return c.w.constant(value, c.out.dtype)
    if c.out.dtype == "bf16":
        tensor = c.w("ConstantOfShape", c.w.shape(c.out.shape), value=_one(value, "f32"))
        return c.w.cast(tensor, "f32", "bf16")
    return c.w("ConstantOfShape", c.w.shape(c.out.shape), value=_one(value, c.out.dtype))


def _one(value: Any, dtype: str) -> Any:
    return np.array([value], dtype=NUMPY[dtype])


@build("full", "full_like", "new_full", "fill.Scalar")
def full(c: Call) -> str:
    value = c["value"] if "fill.Scalar" in c.op.name else c["fill_value"]
    if not isinstance(value, bool | int | float):
        number = c.w.cast(c.w.scalar(value), "i64", c.out.dtype)
        return c.expanded(number, (), c.out.shape)
    return filled(c, value)


@build(
    "zeros", "zeros_like", "new_zeros", "empty.memory_format", "empty_like", "new_empty",
    "empty_permuted", "empty_strided", "new_empty_strided",
)  # fmt: skip
def zeros(c: Call) -> str:
    return filled(c, 0)


@build("ones", "ones_like", "new_ones")
def ones(c: Call) -> str:
    return filled(c, 1)


@build("scalar_tensor")
def scalar_tensor(c: Call) -> str:
    number = c["s"]
    if symbols(number) if not isinstance(number, bool | int | float) else ():
        return c.w.cast(c.w.scalar(number), "i64", c.out.dtype)
    return c.w.constant(number, c.out.dtype)


@build("arange", "arange.start", "arange.start_step")
def arange(c: Call) -> str:
    start = 0 if c.op.name == "aten.arange.default" else c["start"]
    step = c["step"] if c.op.name == "aten.arange.start_step" else 1
    end = c["end"]
    if any(isinstance(v, float) for v in (start, end, step)):
        numbers = [c.w.constant(v, "f64") for v in (start, end, step)]
        return c.w.cast(c.w("Range", *numbers), "f64", c.out.dtype)
    integers = c.w("Range", *(c.w.scalar(v) for v in (start, end, step)))
    return c.w.cast(integers, "i64", c.out.dtype)


@build("tril", "triu")
def triangle(c: Call) -> str:
    value: Value = c["self"]
    upper = int("triu" in c.op.name)
    x = c.read(value, "i32" if value.dtype == "bool" else value.dtype)
    output = c.w("Trilu", x, c.w.constant(c["diagonal"]), upper=upper)
    return c.w.cast(output, "i32", "bool") if value.dtype == "bool" else output
