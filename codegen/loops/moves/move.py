"""Ops that move elements: each returns the input element at the source position."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import index as ix
from moec.codegen.loops.axes import offset, replaced, wrap
from moec.codegen.loops.emission import Point
from moec.codegen.loops.index import Index
from moec.codegen.loops.rules import moves
from moec.codegen.loops.scalars import Scalar


@moves("permute", "permute_copy")
def permute(p: Point) -> Scalar:
    value = p["self"]
    at = list(p.at)
    for position, axis in enumerate(p["dims"]):
        at[wrap(axis, len(at))] = p.at[position]
    return p.read(value, tuple(at))


@moves("transpose.int", "t", "numpy_T", "mT")
def transpose(p: Point) -> Scalar:
    at = list(p.at)
    if len(at) < 2:
        return p.read(p["self"], p.at)
    named = p.emission.named(p.op)
    a, b = wrap(named.get("dim0", -2), len(at)), wrap(named.get("dim1", -1), len(at))
    at[a], at[b] = at[b], at[a]
    return p.read(p["self"], tuple(at))


@moves("expand", "expand_copy", "broadcast_to", "expand_as")
def expand(p: Point) -> Scalar:
    return p.get(p["self"])


@moves("slice.Tensor", "slice_copy.Tensor")
def slice_(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    start = offset(p, p["start"], value.shape[axis])
    position = ix.add(ix.mul(p.at[axis], ix.const(p["step"])), start)
    return p.read(value, replaced(p.at, axis, position))


@moves("narrow")
def narrow(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    start = offset(p, p["start"], value.shape[axis])
    return p.read(value, replaced(p.at, axis, ix.add(p.at[axis], start)))


@moves("select.int", "select_copy.int")
def select(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    position = offset(p, p["index"], value.shape[axis])
    return p.read(value, (*p.at[:axis], position, *p.at[axis:]))


@moves("unbind.int")
def unbind(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    position = ix.const(p.op.outputs.index(p.value))
    return p.read(value, (*p.at[:axis], position, *p.at[axis:]))


@moves("split.Tensor", "split_with_sizes", "chunk", "tensor_split.sections")
def split(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    start = ix.const(0)
    for part in p.op.outputs[: p.op.outputs.index(p.value)]:
        start = ix.add(start, p.size(part.shape[axis]))
    return p.read(value, replaced(p.at, axis, ix.add(p.at[axis], start)))


@moves("flip")
def flip(p: Point) -> Scalar:
    at = list(p.at)
    for axis in (wrap(d, len(at)) for d in p["dims"]):
        at[axis] = ix.sub(ix.sub(p.size(p.shape[axis]), ix.const(1)), at[axis])
        at[axis] = Index(at[axis].expr, at[axis].key)
    return p.read(p["self"], tuple(at))


@moves("roll")
def roll(p: Point) -> Scalar:
    at = list(p.at)
    axes = p["dims"] or (0,)
    for shift, axis in zip(p["shifts"], (wrap(d, len(at)) for d in axes), strict=True):
        size = p.emission.sizes.expr(p.shape[axis])
        back = at[axis].expr - p.emission.sizes.expr(shift)
        back = ix.remainder(ix.remainder(back, size) + size, size)
        at[axis] = Index(back, ("roll", at[axis].key, str(shift), str(p.shape[axis])))
    return p.read(p["self"], tuple(at))


@moves("repeat")
def repeat(p: Point) -> Scalar:
    value = p["self"]
    lead = len(p.at) - len(value.shape)
    at = tuple(
        ix.const(0)
        if dim == 1
        else p.at[lead + axis]
        if dim == p.shape[lead + axis]
        else ix.mod(p.at[lead + axis], p.size(dim))
        for axis, dim in enumerate(value.shape)
    )
    return p.read(value, at)


@moves("unfold")
def unfold(p: Point) -> Scalar:
    value = p["self"]
    if not value.shape:
        return p.read(value, ())
    axis = wrap(p["dimension"], len(value.shape))
    position = ix.add(ix.mul(p.at[axis], ix.const(p["step"])), p.at[-1])
    return p.read(value, replaced(p.at[:-1], axis, position))


@moves("diagonal", "diagonal_copy")
def diagonal(p: Point) -> Scalar:
    value = p["self"]
    a, b = wrap(p["dim1"], len(value.shape)), wrap(p["dim2"], len(value.shape))
    at = list(p.at[:-1])
    for axis, move in sorted(((a, max(0, -p["offset"])), (b, max(0, p["offset"])))):
        at.insert(axis, ix.add(p.at[-1], ix.const(move)))
    return p.read(value, tuple(at))


# ---- complex pairs ---------------------------------------------------------------------


@moves("view_as_complex", "view_as_complex_copy")
def view_as_complex(p: Point) -> Scalar:
    real, imag = (p.read(p["self"], (*p.at, ix.const(part))) for part in (0, 1))
    return Scalar("c64", real.expr, imag.expr)


@moves("view_as_real", "view_as_real_copy")
def view_as_real(p: Point) -> Scalar:
    x = p.read(p["self"], p.at[:-1])
    if p.at[-1].constant is not None:
        return Scalar("f32", x.imag if p.at[-1].constant else x.expr)
    return Scalar("f32", T.Select(tirx.EQ(p.at[-1].expr, tirx.const(0, "int64")), x.expr, x.imag))


@moves("real", "imag")
def real(p: Point) -> Scalar:
    x = p.read(p["self"], p.at)
    return Scalar("f32", x.imag if p.op.name == "aten.imag.default" else x.expr)
