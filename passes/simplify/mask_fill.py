"""Rows that fill a mask in order are gathered: no size depends on the data.

x.masked_scatter(mask, y) -> where(mask, y[order], x)
x[mask] = x[mask] + y     -> where(mask, x + y[order], x)
                             with order = require_count(cumsum(mask) - 1, sum(mask))

This is how features of images take, or are added at, the positions of image tokens. y has one row
for each position that is set, as many as sizes of inputs or constants say. As eager does, the op
require_count refuses more set positions; and fewer, if they are an index or if the module asserts
their number (torch._check).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.ir.graph import Attr, Op, Ref, TensorType, Value
from moec.ir.sizes.dims import Dim, product, symbols
from moec.passes.core.rewrite import Builder

_ASSERTION = "aten._is_all_true.default"  # of torch._check
_POINTWISE = frozenset(
    f"aten.{name}" for name in ("add.Tensor", "sub.Tensor", "mul.Tensor", "_to_copy.default")
)


def scatter(op: Op, b: Builder) -> Sequence[Value] | None:
    """Rewrites masked_scatter of rows or of single values."""
    x, mask, values = op.inputs
    if op.outputs[0].shape != x.shape or not x.shape or not _is_known(b, *x.shape, *values.shape):
        return None
    mask = _before_expand(mask, b)
    width: Dim = 1
    length = product(values.shape)
    if mask.shape == (*x.shape[:-1], 1) and values.shape[-1:] == x.shape[-1:]:
        width, length = x.shape[-1], product(values.shape[:-1])
    elif mask.shape != x.shape:
        return None
    rows = b.reshape(values, (length, width), like=op, named="rows")
    order = _Order(mask, length, _is_asserted(mask, b), rows).emitted(op, b)
    filled = b.reshape(_gather_rows(rows, order, op, b), x.shape, like=op, named="picked")
    return b.emit("aten.where.self", [mask, filled, x], [op.outputs[0].type], like=op)


def put(op: Op, b: Builder) -> Sequence[Value] | None:
    """Rewrites x[mask] = values, where values [n, D] are made of x[mask] and of other rows."""
    x, *indices, values = op.inputs
    if len(indices) != 1 or indices[0].dtype != "bool" or op.attrs.get("accumulate"):
        return None
    (mask,) = indices
    if op.attrs["indices"] != (Ref(1),) or mask.shape != x.shape[:-1]:
        return None
    if len(values.shape) != 2 or not _is_known(b, *x.shape, *values.shape):
        return None
    if values.shape[0] == 1:  # one row for all positions
        return None
    full = _Filling(x, mask, values.shape, op, b).of(values)
    column = b.reshape(mask, (*mask.shape, 1), like=op, named="mask")
    return b.emit("aten.where.self", [column, full, x], [op.outputs[0].type], like=op)


def is_known(op: Op, b: Builder) -> bool:
    """Whether all sizes of the result of x[mask] are known before it runs."""
    return _is_known(b, *op.outputs[0].shape)


@dataclass(frozen=True)
class _Filling:
    """Computes for all positions of `x` what rows of shape `shape` hold for those in `mask`."""

    x: Value
    mask: Value
    shape: tuple[Dim, ...]
    op: Op
    b: Builder

    def of(self, rows: Value) -> Value:
        if rows.shape != self.shape:
            return rows  # one value or row for all
        producer = self.b.producers.get(rows)
        if producer is not None and producer.name == "aten.index.Tensor":
            source, *indices = producer.inputs
            if indices == [self.mask] and source.shape == self.x.shape:
                return source
        if producer is not None and producer.name in _POINTWISE:
            operands = [self.of(operand) for operand in producer.inputs]
            full = [TensorType(rows.dtype, self.x.shape)]
            attrs = producer.attrs
            return self.b.emit(producer.name, operands, full, like=producer, attrs=attrs)[0]
        order = _Order(self.mask, rows.shape[0], True, rows).emitted(self.op, self.b)
        picked = _gather_rows(rows, order, self.op, self.b)
        return self.b.reshape(picked, self.x.shape, like=self.op, named="picked")


def _is_known(b: Builder, *shape: Dim) -> bool:
    named = {name for value in b.graph.inputs for dim in value.shape for name in symbols(dim)}
    return all(symbols(dim) <= named for dim in shape)


@dataclass(frozen=True)
class _Order:
    """For each set position of `mask`, how many are set before it: the row of `source` that fills
    it. There are as many set positions as `rows`, or fewer if not `exact`."""

    mask: Value
    rows: Dim
    exact: bool
    source: Value

    def emitted(self, op: Op, b: Builder) -> Value:
        """i64[n], checked."""
        mask = _flat(self.mask, b)
        line, number = TensorType("i64", (product(mask.shape),)), TensorType("i64", ())
        flat = b.cast(
            b.reshape(mask, line.shape, like=op, named="mask"), "i64", like=op, named="mask"
        )
        (ends,) = b.emit(
            "aten.cumsum.default", [flat], [line], like=op, attrs={"dim": 0}, named="ends"
        )
        (count,) = b.emit(
            "aten.sum.dim_IntList", [flat], [number], like=op, attrs={"dim": ()}, named="count"
        )
        (order,) = b.emit(
            "aten.sub.Tensor", [ends], [line], like=op, attrs={"other": 1}, named="order"
        )
        mask_inputs, source_inputs = _inputs(mask, b), _inputs(self.source, b)
        attrs: dict[str, Attr] = {
            "rows": self.rows,
            "exact": self.exact,
            "mask": ", ".join(mask_inputs),
            "source": ", ".join(n for n in source_inputs if n not in mask_inputs),
        }
        return b.emit("moec.require_count", [order, count], like=op, attrs=attrs, named="order")[0]


def _is_asserted(mask: Value, b: Builder) -> bool:
    """Whether the module asserts something about the number of set positions: by an operator, or
    by the length of what the mask selects, which has no name of its own then."""
    mask = _flat(mask, b)
    return any(mask in _sources(op.inputs[0], b) for op in b.ops if op.name == _ASSERTION) or any(
        mask in _sources(index, b) and _is_known(b, *op.outputs[0].shape)
        for op in b.ops
        if op.name == "aten.index.Tensor"
        for index in op.inputs[1:]
        if index.dtype == "bool"
    )


def _inputs(value: Value, b: Builder) -> list[str]:
    """The names of the inputs that a value depends on, in order."""
    sources = _sources(value, b)
    return [value.name for value in b.graph.inputs if value in sources]


def _sources(value: Value, b: Builder) -> set[Value]:
    """All values that a value depends on."""
    sources, waiting = {value}, [value]
    while waiting:
        producer = b.producers.get(waiting.pop())
        operands = set(producer.inputs if producer else ()) - sources
        sources |= operands
        waiting += operands
    return sources


def _flat(mask: Value, b: Builder) -> Value:
    """The mask before it got its shape, which does not change the order of its elements."""
    producer = b.producers.get(mask)
    while producer is not None and producer.name == "aten.reshape.default":
        mask = producer.inputs[0]
        producer = b.producers.get(mask)
    return mask


def _gather_rows(rows: Value, order: Value, op: Op, b: Builder) -> Value:
    target = [TensorType(rows.dtype, (*order.shape, *rows.shape[1:]))]
    attrs = {"indices": (Ref(1),)}
    inputs = [rows, order]
    return b.emit("aten.index.Tensor", inputs, target, like=op, attrs=attrs, named="picked")[0]


def _before_expand(mask: Value, b: Builder) -> Value:
    """The mask before it was repeated along the features, with an axis of length 1 for them."""
    producer = b.producers.get(mask)
    if producer is not None and producer.name == "aten.expand.default":
        source = producer.inputs[0]
        if source.shape == (*mask.shape[:-1], 1):
            return source
    return mask
