"""Ops that read and write at positions given by data."""

from __future__ import annotations

from collections.abc import Sequence

from moec.codegen.onnx.rules import Call, axis, build
from moec.dtypes import HALVES
from moec.errors import NoMatch
from moec.ir.graph import Value

_BEYOND = 1 << 48  # no axis is so long


def positions(c: Call, value: Value) -> str:
    if value.dtype in ("bool", "u8"):
        raise NoMatch(
            f"operator {c.op.name} with a mask has a result whose size depends on the data"
        )
    return c.read(value, "i64")


@build("embedding")
def embedding(c: Call) -> str:
    return c.w("Gather", c.read(c["weight"]), positions(c, c["indices"]), axis=0)


@build("index_select")
def index_select(c: Call) -> str:
    value: Value = c["self"]
    dim = axis(c["dim"], len(value.shape))
    rows = c.w("Gather", c.read(value), positions(c, c["index"]), axis=dim)
    return rows if c["index"].shape else c.w("Unsqueeze", rows, c.w.constant([dim]))


@build("gather", "take_along_dim")
def gather(c: Call) -> str:
    value: Value = c["self"]
    index = c["index"] if "gather" in c.op.name else c["indices"]
    dim = axis(c["dim"], len(value.shape))
    other_axes = [a for i, a in enumerate(value.shape) if i != dim]
    if "take" in c.op.name and other_axes != [a for i, a in enumerate(index.shape) if i != dim]:
        raise NoMatch(f"operator {c.op.name} of shapes that broadcast has no ONNX form")
    return c.w("GatherElements", c.read(value), positions(c, index), axis=dim)


@build("index.Tensor", "_unsafe_index.Tensor")
def index(c: Call) -> str:
    value: Value = c["self"]
    axes, ids = indexed(c)
    x = c.read(value)
    if len(axes) == 1:
        return c.w("Gather", x, positions(c, ids[0]), axis=axes[0])
    rest = [a for a in range(len(value.shape)) if a not in axes]
    if axes != list(range(len(axes))):
        x = c.w("Transpose", x, perm=[*axes, *rest])
    rows = c.w("GatherND", x, stack_indices(c, ids))
    width = max(len(v.shape) for v in ids)
    lead = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    if lead == 0:
        return rows
    rest_axes = list(range(width, width + len(rest)))
    return c.w("Transpose", rows, perm=[*rest_axes[:lead], *range(width), *rest_axes[lead:]])


def indexed(c: Call) -> tuple[list[int], list[Value]]:
    """(indexed axes, their index tensors)."""
    pairs = [(number, v) for number, v in enumerate(c["indices"]) if v is not None]
    return [number for number, _ in pairs], [v for _, v in pairs]


def stack_indices(c: Call, ids: Sequence[Value]) -> str:
    """The indices, broadcast to one shape and stacked along a last axis."""
    names = [positions(c, v) for v in ids]
    total = names[0]
    for name in names[1:]:  # the common shape of all
        total = c.w("Add", total, name)
    shape = c.w("Shape", total)
    last = c.w.constant([-1])
    parts = [c.w("Unsqueeze", c.w("Expand", name, shape), last) for name in names]
    return parts[0] if len(parts) == 1 else c.w("Concat", *parts, axis=-1)


@build("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(c: Call) -> str:
    value, values = c["self"], c["values"]
    axes, ids = indexed(c)
    if axes != list(range(len(axes))):
        raise NoMatch(f"operator {c.op.name} with indices after a full slice has no ONNX form")
    at = stack_indices(c, ids)
    rest = value.shape[len(axes) :]
    leading = c.w("Shape", at, end=-1)
    shape = c.w("Concat", leading, c.w.shape(rest), axis=0) if rest else leading
    dtype = reduced_dtype(value.dtype) if c["accumulate"] else value.dtype
    updates = c.w("Expand", c.read(values, dtype), shape)
    how = {"reduction": "add"} if c["accumulate"] else {}
    output = c.w("ScatterND", c.read(value, dtype), at, updates, **how)
    return c.w.cast(output, dtype, value.dtype)


def reduced_dtype(dtype: str) -> str:
    """The dtype in which elements are added at positions: ONNX Runtime adds no halves on CPUs."""
    return "f32" if dtype in HALVES else dtype


@build("index_add")
def index_add(c: Call) -> str:
    value, source = c["self"], c["source"]
    if axis(c["dim"], len(value.shape)) != 0 or c["alpha"] != 1:
        raise NoMatch("operator aten.index_add.default not along the first axis has no ONNX form")
    at = c.w("Unsqueeze", positions(c, c["index"]), c.w.constant([-1]))
    dtype = reduced_dtype(value.dtype)
    inputs = [c.read(value, dtype), at, c.read(source, dtype)]
    return c.w.cast(c.w("ScatterND", *inputs, reduction="add"), dtype, value.dtype)


REDUCTIONS = {"sum": "add", "add": "add", "prod": "mul", "multiply": "mul"}
REDUCTIONS |= {"amax": "max", "amin": "min"}


@build("scatter.src", "scatter.value", "scatter_add", "scatter.reduce", "scatter_reduce.two")
def scatter(c: Call) -> str:
    """ONNX requires as many updates as positions; torch ignores extra updates, so they are cut."""
    value, ids = c["self"], c["index"]
    dim = axis(c["dim"], len(value.shape))
    how = {}
    if "scatter_add" in c.op.name:
        how = {"reduction": "add"}
    elif "reduce" in c.op.name:
        if c["reduce"] not in REDUCTIONS or ("two" in c.op.name and not c["include_self"]):
            raise NoMatch(f"operator {c.op.name} by {c['reduce']} has no ONNX form")
        how = {"reduction": REDUCTIONS[c["reduce"]]}
    at, dtype = positions(c, ids), reduced_dtype(value.dtype) if how else value.dtype
    if "scatter.value" in c.op.name:
        updates = c.w("Expand", c.w.constant(c["value"], dtype), c.w("Shape", at))
    else:
        source: Value = c["src"]
        updates = c.read(source, dtype)
        if source.shape != ids.shape:
            zeros, every = c.w.constant([0] * len(ids.shape)), list(range(len(ids.shape)))
            updates = c.w("Slice", updates, zeros, c.w("Shape", at), c.w.constant(every))
    output = c.w("ScatterElements", c.read(value, dtype), at, updates, axis=dim, **how)
    return c.w.cast(output, dtype, value.dtype)


@build("moec.require_count")
def require_count(c: Call) -> str:
    """ONNX has no assertions: where the count is wrong, the indices are beyond the end of every
    table, which ONNX Runtime refuses on CPUs."""
    order, count = c.op.inputs
    rows = c.w.scalar(c.op.attrs["rows"])
    wrong = c.w("Greater", c.read(count), rows)
    if c.op.attrs["exact"]:
        wrong = c.w("Not", c.w("Equal", c.read(count), rows))
    beyond = c.w("Mul", c.w.cast(wrong, "bool", "i64"), c.w.constant(_BEYOND))
    return c.w("Add", c.read(order), beyond)


@build("moec.require_index")
def require_index(c: Call) -> str:
    """ONNX has no assertions: each index reads a table of zeros of the axis's length, since ONNX
    Runtime refuses indices beyond a table on CPUs, and counts negative ones from its end."""
    (ids,) = c.op.inputs
    index = at = c.read(ids, "i64")
    if not c.op.attrs["negative"]:
        below = c.w.cast(c.w("Less", index, c.w.constant(0)), "bool", "i64")
        at = c.w("Add", index, c.w("Mul", below, c.w.constant(_BEYOND)))
    rows = c.w("Reshape", c.w.scalar(c.op.attrs["rows"]), c.w.constant([1]))
    zeros = c.w("Expand", c.w.constant([0]), rows)
    return c.w.cast(c.w("Add", index, c.w("Gather", zeros, at)), "i64", ids.dtype)
