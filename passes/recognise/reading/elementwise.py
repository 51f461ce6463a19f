"""Reads element-wise ops, norms and reductions of rows, and products of rows with routing weights
or masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Op, Ref, TensorType, Value
from moec.ir.sizes.dims import Dim
from moec.passes.recognise.reading.body import ROWS
from moec.passes.recognise.reading.layout import (
    Atom,
    Axis,
    ExpertLayout,
    fused,
    only_features,
    only_rows,
    size_of,
)
from moec.passes.recognise.reading.opnames import MULTIPLY, PICKS, PRODUCTS
from moec.passes.recognise.reading.reader import BlockReader
from moec.passes.recognise.reading.row_wise import at_line, check_numbers, counting, not_row_wise
from moec.passes.recognise.reading.shared_rows import with_shared_rows


def across(reader: BlockReader, op: Op, source: ExpertLayout) -> ExpertLayout | None:
    """Reductions and softmax: over features they become ops of the body; a sum over rows becomes
    part of the combine."""
    if source.param:
        return None
    dim_attr = op.attrs.get("dim")
    rank = len(source.axes)
    dims = dim_attr if isinstance(dim_attr, tuple) else (dim_attr,)
    if dim_attr is None or not dims:
        raise not_row_wise(op, "reduces over all axes")
    positions = sorted(cast(int, d) % rank for d in dims)
    picked = [source.axes[p] for p in positions]
    keep = bool(op.attrs.get("keepdim")) or "softmax" in op.name
    softmax = "softmax" in op.name
    if all(map(only_rows, picked)) and any(picked):
        if op.name != "aten.sum.dim_IntList":
            raise not_row_wise(op, "reduces over rows")
        axes = [
            () if i in positions else axis
            for i, axis in enumerate(source.axes)
            if keep or i not in positions
        ]
        return replace(source, axes=tuple(axes), reduced=True)
    if not all(a and only_features(a) for a in picked):
        raise not_row_wise(op, "reduces over rows and features at once")
    plain = reader.writer.ordered(source, picked)
    removed = [plain.axes[p][0] for p in positions]
    at = tuple(plain.atoms.index(a) + 1 for a in removed)
    atoms = plain.atoms if softmax else tuple(a for a in plain.atoms if a not in removed)
    result_axes = [
        (() if i in positions and not softmax else axis)
        for i, axis in enumerate(plain.axes)
        if keep or i not in positions
    ]
    attrs: dict[str, Attr] = {k: v for k, v in op.attrs.items() if k != "keepdim"}
    attrs["dim"] = at if isinstance(dim_attr, tuple) else at[0]
    types = [TensorType(op.outputs[0].dtype, (ROWS, *(a.size for a in atoms)))]
    (base,) = reader.writer.add(op.name, [plain.base], types, attrs, op.outputs[0].name)
    return replace(plain, base=base, atoms=atoms, axes=tuple(result_axes))


def norm(reader: BlockReader, op: Op, source: ExpertLayout) -> ExpertLayout | None:
    """nn.rms_norm over the last axis, written as element-wise ops: its gain may differ per
    expert."""
    if source.param:
        return None
    if not source.axes[-1] or not only_features(source.axes[-1]):
        raise not_row_wise(op, "reduces over rows")
    plain = reader.writer.ordered(source, [source.axes[-1]], last=True)
    shape, dtype = plain.base.shape, op.outputs[0].dtype
    full, narrow = TensorType("f32", shape), TensorType("f32", (*shape[:-1], 1))

    def step(name: str, inputs: Sequence[Value], type: TensorType, **attrs: Attr) -> Value:
        return reader.writer.add(name, inputs, [type], attrs, op.outputs[0].name)[0]

    def as_dtype(value: Value, to: str) -> Value:
        target = TensorType(to, value.shape)
        same = value.dtype == to
        return value if same else step("aten._to_copy.default", [value], target, dtype=DType(to))

    x = as_dtype(plain.base, "f32")
    square = step("aten.mul.Tensor", [x, x], full)
    mean = step("aten.mean.dim", [square], narrow, dim=(len(shape) - 1,), keepdim=True)
    shifted = step("aten.add.Tensor", [mean], narrow, other=op.attrs["epsilon"])
    scale = step("aten.rsqrt.default", [shifted], narrow)
    y = step("aten.mul.Tensor", [x, scale], full)
    gain = _norm_weight(reader, op.inputs[1]) if len(op.inputs) > 1 else None
    if op.attrs.get("round_first"):
        y = as_dtype(y, dtype)
    if gain is not None:
        weight = gain if op.attrs.get("round_first") else as_dtype(gain, "f32")
        y = step("aten.mul.Tensor", [y, weight], TensorType(y.dtype, shape))
    return replace(plain, base=as_dtype(y, dtype), applied=source.applied or gain is not None)


def layer_norm(reader: BlockReader, op: Op, source: ExpertLayout) -> ExpertLayout | None:
    """aten.layer_norm over the last axis, whose weight and bias may differ per expert."""
    if source.param:
        return None
    normalised = cast(tuple[Attr, ...], op.attrs["normalized_shape"])
    if len(normalised) != 1 or not source.axes[-1] or not only_features(source.axes[-1]):
        raise not_row_wise(op, "reduces over rows")
    plain = reader.writer.ordered(source, [source.axes[-1]], last=True)
    affine = [_norm_weight(reader, value) for value in op.inputs[1:]]
    type = TensorType(op.outputs[0].dtype, plain.base.shape)
    inputs = [plain.base, *affine]
    (base,) = reader.writer.add(op.name, inputs, [type], op.attrs, op.outputs[0].name)
    return replace(plain, base=base, applied=source.applied or bool(affine))


def _norm_weight(reader: BlockReader, value: Value) -> Value:
    """One expert's slice of a weight of a norm."""
    layout = reader.read(value)
    if layout is None or not layout.param:
        raise NoMatch(f"{value.name} scales a norm and is not a weight")
    return reader.writer.slice_of(layout, [layout.axes[-1]], [0], [0])


def cat(reader: BlockReader, op: Op) -> ExpertLayout | None:
    layouts = [reader.read(v) for v in op.inputs]
    rows = [la for la in layouts if la is not None and not la.param]
    if not rows:
        return None
    if len(rows) < len(layouts):
        raise NoMatch("rows are concatenated with something else")
    dim = cast(int, op.attrs.get("dim", 0)) % len(rows[0].axes)
    if not all(la.axes[dim] and only_features(la.axes[dim]) for la in rows):
        raise NoMatch("rows of several kinds are concatenated")
    ready = [reader.writer.in_order(la) for la in rows]
    atom = Atom(op.outputs[0].shape[dim], False)
    position = ready[0].features.index(ready[0].axes[dim][0])
    atoms = tuple(atom if i == position else a for i, a in enumerate(ready[0].atoms))
    axes = tuple((atom,) if i == dim else a for i, a in enumerate(ready[0].axes))
    types = [TensorType(op.outputs[0].dtype, (ROWS, *(a.size for a in atoms)))]
    attrs: dict[str, Attr] = {
        "tensors": tuple(Ref(i) for i in range(len(ready))),
        "dim": position + 1,
    }
    (base,) = reader.writer.add(
        op.name, [la.base for la in ready], types, attrs, op.outputs[0].name
    )
    return replace(ready[0], base=base, atoms=atoms, axes=axes)


def pointwise(reader: BlockReader, op: Op) -> ExpertLayout | None:
    layouts = [reader.read(v) for v in op.inputs]
    rows = [la for la in layouts if la is not None and not la.param]
    if not rows:
        return None
    check_numbers(reader.scope, op)
    shape = op.outputs[0].shape
    layouts = with_shared_rows(reader, op, layouts)
    rows = [la for la in layouts if la is not None and not la.param]
    if any(la is None for la in layouts):
        return weighting(reader, op, layouts, rows)
    if len(layouts) == 1:
        source = rows[0]
        types = [TensorType(op.outputs[0].dtype, source.base.shape)]
        (base,) = reader.writer.add(op.name, [source.base], types, op.attrs, op.outputs[0].name)
        return replace(source, base=base)
    if any(la.reduced for la in rows):
        raise NoMatch(f"{op.name} joins summed rows with something else")
    return join_layouts(
        reader, op.name, op.attrs, [cast(ExpertLayout, la) for la in layouts], shape, op
    )


def join_layouts(
    reader: BlockReader,
    name: str,
    attrs: Mapping[str, Attr],
    layouts: Sequence[ExpertLayout],
    shape: Sequence[Dim],
    op: Op,
) -> ExpertLayout:
    """An element-wise op on rows and expert weights, broadcast to `shape`."""
    rank = len(shape)
    padded = [((),) * (rank - len(la.axes)) + la.axes for la in layouts]
    axes: list[Axis] = []
    for dim in range(rank):
        here = [p[dim] for p in padded if p[dim]]
        features = [a for a in here if not only_rows(a)]
        if any(not only_features(a) for a in features):
            raise NoMatch("an axis mixes rows and features")
        if features and len(features) < len(here):
            raise NoMatch("rows are broadcast against features")
        chosen = features or here
        axes.append((fused(chosen[0]),) if features else chosen[0] if here else ())
    wide = [dim for dim in range(rank) if axes[dim] and not only_rows(axes[dim])]
    inputs = []
    for layout, padded_axes in zip(layouts, padded, strict=True):
        plain = reader.writer.in_order(replace(layout, axes=padded_axes))
        have = [dim for dim in wide if padded_axes[dim]]
        if layout.param:
            inputs.append(reader.writer.slice_of(plain, [padded_axes[p] for p in have], wide, have))
        else:
            sizes = [size_of(padded_axes[p]) if p in have else 1 for p in wide]
            inputs.append(reader.writer.reshape(plain.base, sizes))
    atoms = tuple(axes[p][0] for p in wide)
    types = [TensorType(op.outputs[0].dtype, (ROWS, *(a.size for a in atoms)))]
    (base,) = reader.writer.add(name, inputs, types, attrs, op.outputs[0].name)
    first = next(la for la in layouts if not la.param)
    return ExpertLayout(
        base,
        atoms,
        tuple(axes),
        weighted=any(la.weighted for la in layouts),
        applied=any(la.applied or la.param for la in layouts),
        reduced=first.reduced,
    )


def joined(reader: BlockReader, op: Op, layouts: Sequence[ExpertLayout | None]) -> NoMatch:
    """The refusal of an op that joins rows with something that is no rows of the expert."""
    for value in (v for v, la in zip(op.inputs, layouts, strict=True) if la is None):
        pick = reader.scope.made_by(value, *PICKS)
        source = reader.scope.source_of(pick.inputs[0]) if pick is not None else value
        product = reader.scope.made_by(source, *PRODUCTS)
        if pick is not None and product is not None:
            return NoMatch(
                f"{op.name} joins rows of an expert with rows of {source.name}{at_line(product)}, "
                "a product that all experts share: they are rows of other tokens than the expert's"
            )
    return NoMatch(f"{op.name} joins rows with {reader.opaque(op, layouts)}{at_line(op)}")


def weighting(
    reader: BlockReader,
    op: Op,
    layouts: Sequence[ExpertLayout | None],
    rows: Sequence[ExpertLayout],
) -> ExpertLayout:
    """Rows multiplied by routing weights, or selected by a mask."""
    if len(rows) != 1 or any(la is not None and la.param for la in layouts):
        raise joined(reader, op, layouts)
    source = rows[0]
    others = [v for v, la in zip(op.inputs, layouts, strict=True) if la is None]
    rank = len(op.outputs[0].shape)
    padded = ((),) * (rank - len(source.axes)) + source.axes
    if op.name == "aten.where.self" and len(others) == 2 and reader.is_zeros(others[1]):
        others = others[:1]
    elif op.name not in (*MULTIPLY, "aten.masked_fill.Scalar") or len(others) != 1:
        counts = [count for v in others if (count := counting(reader.scope, v)) is not None]
        if counts:
            raise not_row_wise(counts[0], "counts the rows")
        raise joined(reader, op, layouts)
    axes = list(padded)
    spread = reader.scope.made_by(others[0], "aten.expand.default")
    if spread is not None:
        others = [spread.inputs[0]]
    for dim, (padded_axes, size) in enumerate(zip(padded, op.outputs[0].shape, strict=True)):
        shift = len(others[0].shape) - rank
        theirs = others[0].shape[dim + shift] if dim + shift >= 0 else 1
        if theirs == 1:
            continue
        if padded_axes and not only_rows(padded_axes):
            raise NoMatch(f"{others[0].name} weights features, not rows")
        if not padded_axes:
            axes[dim] = (Atom(size, True),)
    masks = op.name == "aten.where.self" or op.name == "aten.masked_fill.Scalar"
    reader.use("mask" if masks else "weights", others[0])
    reader.doubt(others[0])
    if not masks and not source.applied:
        reader.input_side = True
    return replace(source, axes=tuple(axes), weighted=source.weighted or not masks)
