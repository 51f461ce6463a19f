"""Reads products: of rows with expert weights, and of masks with rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from moec.errors import NoMatch
from moec.ir.graph import Op, TensorType, Value
from moec.ir.sizes.dims import product as total
from moec.passes.recognise.reading import elementwise
from moec.passes.recognise.reading.layout import (
    Atom,
    Axis,
    ExpertLayout,
    likeness,
    only_features,
    only_rows,
)
from moec.passes.recognise.reading.opnames import GROUPED
from moec.passes.recognise.reading.reader import BlockReader
from moec.passes.recognise.reading.row_wise import not_row_wise
from moec.passes.recognise.region import chooses


def product(reader: BlockReader, op: Op) -> ExpertLayout | None:
    name = op.name
    bias: Value | None = None
    left, right = op.inputs[0], op.inputs[1]
    if name in ("aten.addmm.default", "aten.baddbmm.default"):
        if set(op.attrs) & {"alpha", "beta"}:
            raise NoMatch(f"{name} with factors is not a linear layer")
        bias, left, right = op.inputs[:3]
    elif name == "aten.linear.default" and len(op.inputs) > 2:
        bias = op.inputs[2]
    sides = [reader.read(left), reader.read(right)]
    stacks = [i for i, side in enumerate(sides) if side is not None and side.param]
    rows = [i for i, side in enumerate(sides) if side is not None and not side.param]
    if len(stacks) == 2 or (not stacks and not rows):
        return None
    if len(rows) == 2:
        raise not_row_wise(op, "multiplies rows with rows")
    if not stacks:
        return mix(reader, op, sides, (left, right))
    which = stacks[0]
    weight = cast(ExpertLayout, sides[which])
    if not reader.writer.alone and (weight.expert is None or len(weight.atoms) < 3):
        return None  # one matrix for all experts
    if name in GROUPED:
        reader.use("ends", op.inputs[2])
    source = sides[1 - which] or reader.tokens((left, right)[1 - which])
    if source.reduced:
        raise NoMatch("summed rows go through another product")
    result = linear(reader, op, source, weight, rows_left=which == 1)
    if bias is None:
        return result
    shift = reader.read(bias)
    if shift is None or not shift.param:
        raise NoMatch(f"{bias.name} is added to a product and is not a weight")
    base = reader.writer.ops[-1] if reader.writer.ops else None
    along = likeness(shift.axes[-1]) == likeness(result.axes[-1]) or only_features(shift.axes[-1])
    is_bias = along and shift.features == shift.atoms[-1:]
    if base is not None and base.outputs[0] is result.base and is_bias:
        only = reader.writer.slice_of(shift, [shift.features], [0], [0])
        if only.shape == result.base.shape[-1:]:
            reader.writer.ops[-1] = replace(base, inputs=(*base.inputs, only))
            return result
    return elementwise.join_layouts(
        reader, "aten.add.Tensor", {}, [result, shift], op.outputs[0].shape, op
    )


def linear(
    reader: BlockReader, op: Op, source: ExpertLayout, weight: ExpertLayout, rows_left: bool
) -> ExpertLayout:
    a, w = source.axes, weight.axes
    turned = op.name == "aten.linear.default"
    vector = rows_left and len(w) == 1
    if rows_left:
        inner, outer = (w[-1], ()) if vector else (w[-1], w[-2]) if turned else (w[-2], w[-1])
        summed, free = a[-1], a[-2] if len(a) > 1 else ()
    else:
        inner, outer = w[-1], w[-2]
        summed, free = a[-2], a[-1]
    sums = not only_features(summed)
    if likeness(summed) != likeness(inner) and (sums or not only_features(inner)):
        raise NoMatch(f"{op.name} sums over {summed or 'nothing'} and {inner or 'nothing'}")
    # If rows of several experts or slots lie side by side in a summed axis, the product sums over
    # them too.
    summed, inner = (tuple(x for x in axis if not x.rows) for axis in (summed, inner))
    grouped = op.name in GROUPED
    columns = tuple(atom for atom in outer if not atom.rows)
    plain = reader.writer.ordered(source, [summed], last=True)
    count = total(tuple(atom.size for atom in columns))
    matrix = reader.writer.matrix(weight, columns, inner)
    shape = (*plain.base.shape[:-1], count)
    (base,) = reader.writer.add(
        "aten.linear.default",
        [plain.base, matrix],
        [TensorType(op.outputs[0].dtype, shape)],
        {},
        op.outputs[0].name,
    )
    rest = tuple(x for x in plain.atoms if x is not plain.atoms[-1])
    result = Atom(count, False)
    new_outer = (
        tuple(
            result if atom is columns[0] else atom
            for atom in outer
            if atom.rows or atom is columns[0]
        )
        if columns
        else outer
    )
    if not columns and count == 1:
        rest_atoms = rest
        base = reader.writer.reshape(base, tuple(x.size for x in rest))
    else:
        rest_atoms = (*rest, result)
    if vector:
        axes = a[:-1]
    elif turned or grouped:
        axes = (*a[:-1], new_outer)
    else:
        rank = len(op.outputs[0].shape)
        mine_batch = ((),) * (rank - len(a)) + a[:-2]
        their_batch = ((),) * (rank - len(w)) + w[:-2]
        batch = tuple(p or q for p, q in zip(mine_batch, their_batch, strict=True))
        axes = (*batch, free, new_outer) if rows_left else (*batch, new_outer, free)
    return replace(
        plain, base=base, atoms=rest_atoms, axes=axes, applied=True, reduced=plain.reduced or sums
    )


def mix(
    reader: BlockReader, op: Op, sides: Sequence[ExpertLayout | None], values: Sequence[Value]
) -> ExpertLayout:
    """Rows gathered or summed by a product with masks or routing weights."""
    which = 0 if sides[0] is not None else 1
    source, other = cast(ExpertLayout, sides[which]), values[1 - which]
    if op.name not in ("aten.bmm.default", "aten.mm.default", "aten.matmul.default"):
        raise NoMatch(f"{op.name} multiplies rows with {other.name}")
    summed = source.axes[-1] if which == 0 else source.axes[-2]
    if not summed or not only_rows(summed):
        met = not chooses(reader.scope, other)
        meets = ": it mixes tokens, as attention does" if met else ""
        raise NoMatch(
            f"{op.name} multiplies features with {other.name}, which is not a weight{meets}"
        )
    rank = len(op.outputs[0].shape)
    free = other.shape[-1] if which == 0 else other.shape[-2]
    padded = ((),) * (rank - len(source.axes)) + source.axes
    batch = list(padded[:-2])
    for dim in range(rank - 2):
        shift = dim + len(other.shape) - rank
        if not batch[dim] and shift >= 0 and other.shape[shift] != 1:
            batch[dim] = (Atom(other.shape[shift], True),)
    new: Axis = (Atom(free, True),) if free != 1 else ()
    axes = (*batch, padded[-2], new) if which == 0 else (*batch, new, padded[-1])
    reader.use("mix" if source.applied else "dispatch", other)
    reader.doubt(other)
    if source.applied:
        return replace(source, axes=axes, reduced=True, weighted=True)
    return replace(source, axes=axes)
