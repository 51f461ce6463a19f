"""Equivalent ops are written in one form, so that later passes match one form each.

t, transpose, numpy_T           -> permute
mm(x, permute(w)), addmm, matmul(x, permute(w)) -> linear(x, w, bias)
squeeze, unsqueeze, flatten, the only element of an axis -> reshape
                                                    (of known or named sizes)
clone, alias, detach, a cast to the same dtype, a slice of everything, an expand or
reshape or permute that changes nothing, x * 1, x + 0 of integers, a cat of one value,
dropout at inference            -> their input
scatter(z, order of a whole axis, 1) -> ones
reshape(reshape(x))             -> reshape(x)
x[mask], x.masked_scatter(mask) -> x[where the mask is set]
x.masked_scatter(mask, y), x[mask] = y -> where(mask, y[cumsum(mask) - 1], x)
                                                    (of known or named sizes)
softmax(x, dtype=f32), sum(x, dtype=f32) of float64 -> softmax(cast(x)), sum(cast(x))
bucketize(x, edges)             -> sum(not edges >= x[.., None], -1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.dtypes import FLOATS
from moec.ir.graph import Op, Program, Stage, TensorType, Value
from moec.ir.traits import IDENTITIES
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass
from moec.passes.simplify import mask_fill, mask_rows

# A scatter to all positions of an axis becomes a constant.
#
#     i = aten.topk(x) <k=T, dim=0>       of x[T, E]: each position of the axis once
#     y = aten.scatter(z, i) <value=1>    ->   y = aten.full_like(z) <1>
#     m = aten.mul(mask, y)               ->   mask        of integers
#
# This removes a capacity (random token selection, arXiv 2201.05596) that is at least the number of
# tokens.

_ORDERS = ("aten.topk.default", "aten.sort.default", "aten.sort.stable", "aten.argsort.default")


def scatter(op: Op, b: Builder) -> Sequence[Value] | None:
    """One number scattered to every position of an axis, in any order, is a constant tensor."""
    x, index = op.inputs
    order = b.producers.get(index)
    if order is None or order.name not in _ORDERS or x.shape != index.shape:
        return None
    rank, number = len(x.shape), op.attrs.get("value")
    written, sorted_by = (int(o.attrs.get("dim", -1)) % rank for o in (op, order))  # type: ignore[arg-type]
    if index is not order.outputs[-1] or written != sorted_by or "reduce" in op.attrs:
        return None
    attrs = {"fill_value": number}
    return b.emit("aten.full_like.default", [x], [op.outputs[0].type], like=op, attrs=attrs)


def is_one(value: Value, b: Builder) -> bool:
    """Whether every element of `value` is 1."""
    op = b.producers.get(value)
    return (
        op is not None
        and op.name in ("aten.full_like.default", "aten.full.default")
        and op.attrs["fill_value"] == 1
    )


# ---- the bucket of a value is the number of boundaries below it ----------------------
# bucketize(x, edges)        -> sum(not edges >= x[.., None], -1)
# bucketize(x, edges, right) -> sum(not edges > x[.., None], -1)
#
# NaN is above all boundaries, as in torch.
#
# Vision towers number the patches of an image with a few dozen boundaries, so that counting them
# all costs little.


def bucketize(op: Op, b: Builder) -> Sequence[Value] | None:
    x, edges = op.inputs
    if len(edges.shape) != 1 or op.attrs.get("out_int32"):
        return None
    comparison = "aten.gt.Tensor" if op.attrs.get("right") else "aten.ge.Tensor"
    column = b.reshape(x, (*x.shape, 1), like=op, named="column")
    mask_type = TensorType("bool", (*x.shape, *edges.shape))
    (reached,) = b.emit(comparison, [edges, column], [mask_type], like=op, named="reached")
    (below,) = b.emit("aten.logical_not.default", [reached], [mask_type], like=op, named="below")
    count = b.cast(below, "i64", like=op, named="below")
    attrs = {"dim": (-1,)}
    return b.emit("aten.sum.dim_IntList", [count], [op.outputs[0].type], like=op, attrs=attrs)


Simplify = Callable[[Op, Builder], Sequence[Value] | None]


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Write equivalent ops in one form: permute, reshape, linear; drop ops that change nothing."""

    name: ClassVar[str] = "canonicalise"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, canonicalise, log), program.weights)


def canonicalise(op: Op, b: Builder) -> Sequence[Value] | None:
    rule = _RULES.get(op.name)
    if rule is not None:
        return rule(op, b)
    return op.inputs[:1] if op.name in IDENTITIES else None


def _same_type(op: Op, b: Builder) -> Sequence[Value] | None:
    return op.inputs[:1] if op.inputs[0].type == op.outputs[0].type else None


def _alias(op: Op, b: Builder) -> Sequence[Value] | None:
    """The operand of an alias; aliases that name the graph's outputs stay."""
    return None if any(v.name == op.outputs[0].name for v in b.graph.outputs) else op.inputs[:1]


def _masked_scatter(op: Op, b: Builder) -> Sequence[Value] | None:
    return mask_rows.scatter(op, b) or mask_fill.scatter(op, b)


def _index_put(op: Op, b: Builder) -> Sequence[Value] | None:
    return mask_fill.put(op, b) or mask_rows.put(op, b)


def _cat(op: Op, b: Builder) -> Sequence[Value] | None:
    return _same_type(op, b) if len(op.inputs) == 1 else None


def _slice(op: Op, b: Builder) -> Sequence[Value] | None:
    """The operand of a slice of the same type, which selects all elements."""
    start, step = op.attrs.get("start"), op.attrs.get("step", 1)
    from_start = start in (None, 0) and step == 1
    return _same_type(op, b) if from_start else None


def _neutral_operand(neutral: int, kinds: str) -> Simplify:
    """x * 1 of integers and floats, x + 0 of integers only, since -0.0 + 0 is 0.0."""

    def rule(op: Op, b: Builder) -> Sequence[Value] | None:
        if op.name == "aten.mul.Tensor" and len(op.inputs) == 2 and op.outputs[0].dtype[0] == "i":
            for x, other in (op.inputs, op.inputs[::-1]):
                if x.type == op.outputs[0].type and is_one(other, b):
                    return (x,)
        alone = len(op.inputs) == 1 and op.inputs[0].dtype[0] in kinds
        exact = alone and op.attrs.get("other") == neutral and op.attrs.get("alpha", 1) == 1
        return _same_type(op, b) if exact and "self" not in op.attrs else None

    return rule


def _cast_first(op: Op, b: Builder) -> Sequence[Value] | None:
    """softmax(x, dtype=f32) of float64 as softmax(cast(x)), and the other way round."""
    (x,), out = op.inputs, op.outputs[0].type
    if (x.dtype == "f64") == (out.dtype == "f64") or not {x.dtype, out.dtype} <= set(FLOATS):
        return None
    attrs = {name: value for name, value in op.attrs.items() if name != "dtype"}
    return b.emit(op.name, [b.cast(x, out.dtype, like=op)], [out], like=op, attrs=attrs)


def _reshape(op: Op, b: Builder) -> Sequence[Value] | None:
    x = op.inputs[0]
    if x.type == op.outputs[0].type:
        return (x,)
    source = b.producers.get(x)
    shape = op.outputs[0].shape
    if op.name == "aten.reshape.default" and op.attrs["shape"] == shape:
        if source is None or source.name != "aten.reshape.default":
            return None
    if source is not None and source.name == "aten.reshape.default":
        x = source.inputs[0]
        if x.type == op.outputs[0].type:
            return (x,)
    return [b.reshape(x, shape, like=op)]


def _select(op: Op, b: Builder) -> Sequence[Value] | None:
    x, dim = op.inputs[0], op.attrs.get("dim", 0)
    assert isinstance(dim, int)
    return _reshape(op, b) if x.shape[dim] == 1 else None


def _permute(op: Op, b: Builder) -> Sequence[Value] | None:
    x = op.inputs[0]
    rank = len(x.shape)
    order = _order(op, rank)
    source = b.producers.get(x)
    if source is not None and source.name == "aten.permute.default":
        inner = source.attrs["dims"]
        assert isinstance(inner, tuple)
        order = tuple(int(inner[axis]) for axis in order)
        x = source.inputs[0]
    if order == tuple(range(rank)):
        return (x,)
    if x is op.inputs[0] and op.name == "aten.permute.default" and op.attrs["dims"] == order:
        return None
    return [b.permute(x, order, like=op)]


def _order(op: Op, rank: int) -> tuple[int, ...]:
    if op.name == "aten.permute.default":
        dims = op.attrs["dims"]
        assert isinstance(dims, tuple)
        return tuple(int(d) % rank for d in dims)
    order = list(range(rank))
    if op.name == "aten.transpose.int":
        a, c = (int(op.attrs[name]) % rank for name in ("dim0", "dim1"))  # type: ignore[arg-type]
        order[a], order[c] = order[c], order[a]
    else:
        order.reverse()
    return tuple(order)


def transposed(value: Value, b: Builder) -> Value | None:
    """x where value = permute(x) swaps the last two axes of a matrix."""
    source = b.producers.get(value)
    if source is None or source.name != "aten.permute.default" or len(value.shape) != 2:
        return None
    return source.inputs[0] if source.attrs["dims"] == (1, 0) else None


def _matmul(op: Op, b: Builder) -> Sequence[Value] | None:
    """x @ w.T with w a param is a linear layer; the weight may be stored either way."""
    x, matrix = op.inputs
    if len(matrix.shape) != 2 or len(x.shape) < 2:
        return None
    weight = transposed(matrix, b)
    if weight is None:
        if matrix not in b.params:
            return None
        weight = b.permute(matrix, (1, 0), like=op)
    return b.emit("aten.linear.default", [x, weight], [op.outputs[0].type], like=op)


def _addmm(op: Op, b: Builder) -> Sequence[Value] | None:
    bias, x, matrix = op.inputs
    weight = transposed(matrix, b)
    plain = op.attrs.get("alpha", 1) == 1 and op.attrs.get("beta", 1) == 1
    if weight is None or not plain or len(bias.shape) != 1:
        return None
    return b.emit("aten.linear.default", [x, weight, bias], [op.outputs[0].type], like=op)


_RULES: dict[str, Simplify] = {
    "aten.alias.default": _alias,
    "aten._to_copy.default": _same_type,
    "aten.softmax.int": _cast_first,
    "aten.log_softmax.int": _cast_first,
    "aten.sum.dim_IntList": _cast_first,
    "aten.expand.default": _same_type,
    "aten.cat.default": _cat,
    "aten.slice.Tensor": _slice,
    "aten.add.Tensor": _neutral_operand(0, "i"),
    "aten.mul.Tensor": _neutral_operand(1, "if"),
    "aten.reshape.default": _reshape,
    "aten.unsqueeze.default": _reshape,
    "aten.squeeze.default": _reshape,
    "aten.squeeze.dim": _reshape,
    "aten.squeeze.dims": _reshape,
    "aten.flatten.using_ints": _reshape,
    "aten.unflatten.int": _reshape,
    "aten.select.int": _select,
    "aten.permute.default": _permute,
    "aten.transpose.int": _permute,
    "aten.t.default": _permute,
    "aten.mm.default": _matmul,
    "aten.matmul.default": _matmul,
    "aten.addmm.default": _addmm,
    "aten.scatter.value": scatter,
    "aten.index.Tensor": mask_rows.index,
    "aten.index_put.default": _index_put,
    "aten.masked_scatter.default": _masked_scatter,
    "aten.bucketize.Tensor": bucketize,
}
