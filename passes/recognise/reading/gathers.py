"""Reads rows and weights gathered by ids, rows written into zeros, and slices of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from moec.errors import NoMatch
from moec.ir.graph import Attr, Op, TensorType, Value
from moec.passes.recognise.reading.body import ROWS
from moec.passes.recognise.reading.layout import (
    Atom,
    ExpertLayout,
    only_features,
    only_rows,
    size_of,
)
from moec.passes.recognise.reading.opnames import SCATTERS
from moec.passes.recognise.reading.reader import BlockReader


def index(reader: BlockReader, op: Op, source: ExpertLayout) -> ExpertLayout:
    """Rows, or the weights of experts, gathered by ids."""
    shape = op.outputs[0].shape
    if op.name == "aten.index.Tensor":
        dims = [
            i for i, v in enumerate(cast("tuple[Attr, ...]", op.attrs["indices"])) if v is not None
        ]
        rank = max(len(v.shape) for v in op.inputs[1:])
    else:
        dims = [cast(int, op.attrs.get("dim", 0))]
        rank = len(op.inputs[1].shape)
    if dims != list(range(dims[0], dims[0] + len(dims))):
        raise NoMatch("an index picks from axes that are not neighbours")
    axes = source.axes
    picked = axes[dims[0] : dims[-1] + 1]
    if not all(map(only_rows, picked)):
        raise NoMatch("an index picks features")
    if source.param:
        if source.expert is None or picked != ((source.expert,),):
            name = source.base.name
            raise NoMatch(f"an index picks from {name}, which is not stacked over experts")
        reader.use("ids", op.inputs[1])
    else:
        for value in op.inputs[1:]:
            reader.use("order", value)
    new = tuple((Atom(d, True),) if d != 1 else () for d in shape[dims[0] :][:rank])
    return replace(source, axes=(*axes[: dims[0]], *new, *axes[dims[-1] + 1 :]))


def gather(reader: BlockReader, op: Op, source: ExpertLayout) -> ExpertLayout:
    dim = cast(int, op.attrs["dim"]) % len(source.axes)
    if source.param or not only_rows(source.axes[dim]):
        raise NoMatch("a gather picks features")
    reader.use("order", op.inputs[1])
    size = op.outputs[0].shape[dim]
    axes = list(source.axes)
    axes[dim] = (Atom(size, True),) if size != 1 else ()
    return replace(source, axes=tuple(axes))


def put(reader: BlockReader, op: Op) -> ExpertLayout | None:
    """Rows written into zeros, or added into any value, which is then the block's addend."""
    values = op.inputs[-1]
    layout = reader.read(values)
    if layout is None or layout.param:
        return None
    base, adds = op.inputs[0], bool(op.attrs.get("accumulate")) or op.name in SCATTERS
    if not reader.is_zeros(base):
        if not (adds and layout.applied):
            raise NoMatch(f"rows are added into {base.name}, which is not zero")
        reader.addends[op.outputs[0]] = base
    for index in op.inputs[1:-1]:
        reader.use("order", index if op.name not in SCATTERS else _column(reader, op, index))
    shape = op.outputs[0].shape
    features = [axis for axis in layout.axes if axis and only_features(axis)]
    lead = len(shape) - len(features)
    if lead < 1 or any(not only_rows(a) for a in layout.axes[: len(layout.axes) - len(features)]):
        raise NoMatch("an index_put writes into features")
    rows = tuple((Atom(d, True),) if d != 1 else () for d in shape[:lead])
    return replace(layout, axes=(*rows, *features), reduced=adds and layout.applied)


def _column(reader: BlockReader, op: Op, index: Value) -> Value:
    """The row indices [n, 1] behind an index [n, D] that repeats them along the features."""
    spread = reader.scope.made_by(index, "aten.expand.default", "aten.repeat.default")
    if op.attrs.get("dim", 0) != 0 or spread is None or spread.inputs[0].shape[-1] != 1:
        raise NoMatch(f"{op.name} adds numbers, not rows")
    return spread.inputs[0]


def part(reader: BlockReader, op: Op, source: ExpertLayout | None) -> Sequence[ExpertLayout | None]:
    """Slice, select and split along a feature axis."""
    if source is None:
        return [None] * len(op.outputs)
    if len(op.outputs) == 1 and op.outputs[0].shape == op.inputs[0].shape:
        return [source]
    dim = cast(int, op.attrs.get("dim", 0)) % len(source.axes)
    axis = source.axes[dim]
    if not axis or not only_features(axis):
        what = "an expert's slice" if source.param else "rows"
        raise NoMatch(f"{op.name} cuts {what} out of a stack")
    if source.param:
        if op.outputs[0] in reader.scope.constants:
            return [slice_of_weights(v, source, dim) for v in op.outputs]
        raise NoMatch(f"{op.name} cuts weights that an index has picked")
    plain = reader.writer.ordered(source, [axis])
    position = plain.atoms.index(plain.axes[dim][0]) + 1
    attrs = {**op.attrs, "dim": position}
    results = []
    types = []
    for value in op.outputs:
        atoms = list(plain.atoms)
        axes = list(plain.axes)
        if op.name == "aten.select.int":
            del atoms[position - 1], axes[dim]
        else:
            atoms[position - 1] = Atom(value.shape[dim], False)
            axes[dim] = (atoms[position - 1],)
        types.append(TensorType(value.dtype, (ROWS, *(a.size for a in atoms))))
        results.append((tuple(atoms), tuple(axes)))
    bases = reader.writer.add(op.name, [plain.base], types, attrs, op.outputs[0].name)
    return [
        replace(plain, base=base, atoms=atoms, axes=axes)
        for base, (atoms, axes) in zip(bases, results, strict=True)
    ]


def slice_of_weights(value: Value, source: ExpertLayout, dim: int) -> ExpertLayout:
    """The layout of a slice of constant weights along `dim`; the slice keeps the expert axis."""
    atoms = tuple(
        a[0]
        if len(a) == 1 and i != dim
        else Atom(size_of(a) if i != dim else d, only_rows(a) and bool(a))
        for i, (a, d) in enumerate(zip(source.axes, value.shape, strict=True))
    )
    expert = next((a for a in atoms if a.rows), None)
    return ExpertLayout(
        value, atoms, tuple((a,) if a.size != 1 else () for a in atoms), True, expert
    )
