"""Ops that move elements, or make them from nothing: each says where an element comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.generic import index as ix
from moec.codegen.generic import scalars as sc
from moec.codegen.generic.arithmetic import choose
from moec.codegen.generic.emission import Emission, Point
from moec.codegen.generic.index import Index, Position
from moec.codegen.generic.rules import EMIT, Rule, moves, point
from moec.codegen.generic.scalars import Scalar
from moec.ir import Op, Value
from moec.sizes import Dim, product


def wrap(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def offset(p: Point, start: Any, size: Dim) -> Index:
    """Where a slice starts: counted from the end where negative, at least 0."""
    if start is None:
        return ix.const(0)
    if isinstance(start, int) and start >= 0:
        return ix.const(start)
    if isinstance(start, int) and isinstance(size, int):
        return ix.const(max(0, size + start))
    if isinstance(start, sympy.Expr) and start.is_nonnegative:
        return p.size(start)
    expr = p.emission.sizes.expr(start)
    wrapped = T.Select(expr < 0, expr + p.emission.sizes.expr(size), expr)
    return Index(tirx.max(wrapped, tirx.const(0, "int64")), ("start", str(start), str(size)))


def _replaced(at: Position, axis: int, by: Index) -> Position:
    return (*at[:axis], by, *at[axis + 1 :])


# ---- the same elements in another shape ------------------------------------------------


def _parts(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes that hold the same elements: wherever the products so far agree."""

    def prefixes(shape: Sequence[Dim]) -> list[Dim]:
        found: list[Dim] = [1]
        for dim in shape:
            found.append(product((found[-1], dim)))
        return found

    own, new = prefixes(before), prefixes(after)
    parts: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ends = next(
            (
                (a, b)
                for a in range(i, len(before) + 1)
                for b in range(j, len(after) + 1)
                if (a, b) != (i, j) and own[a] == new[b] and own[a] != 0
            ),
            (len(before), len(after)),
        )
        parts.append((list(range(i, ends[0])), list(range(j, ends[1]))))
        i, j = ends
    return parts


def only_splits(op: Op) -> bool:
    """Whether each axis before becomes whole axes after: positions then need no division."""
    before, after = op.inputs[0].shape, op.outputs[0].shape
    return all(sum(before[a] != 1 for a in own) <= 1 for own, _ in _parts(before, after))


def reshaped(p: Point) -> Scalar:
    value = p.op.inputs[0]
    if p.emission.flat or value.shape == p.value.shape:
        return p.read(value, p.at)
    at: list[Index] = [ix.const(0)] * len(value.shape)
    for own, new in _parts(value.shape, p.value.shape):
        flat = ix.const(0)
        for axis in new:
            flat = ix.add(ix.mul(flat, p.size(p.value.shape[axis])), p.at[axis])
        live = [axis for axis in own if value.shape[axis] != 1]
        for place, axis in reversed(list(enumerate(live))):
            size = p.size(value.shape[axis])
            at[axis] = flat if place == 0 else ix.mod(flat, size)
            flat = flat if place == 0 else ix.div(flat, size)
    return p.read(value, tuple(at))


for _name in (
    "view",
    "_unsafe_view",
    "reshape",
    "flatten.using_ints",
    "unflatten.int",
    "unsqueeze",
    "squeeze",
    "squeeze.dim",
    "squeeze.dims",
    "view_copy",
    "unsqueeze_copy",
    "clone",
    "alias",
    "detach",
    "lift_fresh_copy",
    "contiguous",
):
    _full = f"aten.{_name}" if "." in _name else f"aten.{_name}.default"
    EMIT[_full] = Rule(point=reshaped, view=True, cost=0, same_position=False, exact=True)


# ---- moving ----------------------------------------------------------------------------


@moves("permute", "permute_copy")
def permute(p: Point) -> Scalar:
    value = p["self"]
    at = list(p.at)
    for place, axis in enumerate(p["dims"]):
        at[wrap(axis, len(at))] = p.at[place]
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
    place = ix.add(ix.mul(p.at[axis], ix.const(p["step"])), start)
    return p.read(value, _replaced(p.at, axis, place))


@moves("narrow")
def narrow(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    start = offset(p, p["start"], value.shape[axis])
    return p.read(value, _replaced(p.at, axis, ix.add(p.at[axis], start)))


@moves("select.int", "select_copy.int")
def select(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    place = offset(p, p["index"], value.shape[axis])
    return p.read(value, (*p.at[:axis], place, *p.at[axis:]))


@moves("unbind.int")
def unbind(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    place = ix.const(p.op.outputs.index(p.value))
    return p.read(value, (*p.at[:axis], place, *p.at[axis:]))


@moves("split.Tensor", "split_with_sizes", "chunk", "tensor_split.sections")
def split(p: Point) -> Scalar:
    value = p["self"]
    axis = wrap(p["dim"], len(value.shape))
    start = ix.const(0)
    for part in p.op.outputs[: p.op.outputs.index(p.value)]:
        start = ix.add(start, p.size(part.shape[axis]))
    return p.read(value, _replaced(p.at, axis, ix.add(p.at[axis], start)))


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
        back = ix.rest(ix.rest(back, size) + size, size)
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
    axis = wrap(p["dimension"], len(value.shape))
    place = ix.add(ix.mul(p.at[axis], ix.const(p["step"])), p.at[-1])
    return p.read(value, _replaced(p.at[:-1], axis, place))


@moves("diagonal", "diagonal_copy")
def diagonal(p: Point) -> Scalar:
    value = p["self"]
    a, b = wrap(p["dim1"], len(value.shape)), wrap(p["dim2"], len(value.shape))
    at = list(p.at[:-1])
    for axis, move in sorted(((a, max(0, -p["offset"])), (b, max(0, p["offset"])))):
        at.insert(axis, ix.add(p.at[-1], ix.const(move)))
    return p.read(value, tuple(at))


# ---- a choice between sources ----------------------------------------------------------


def branch(p: Point, condition: Expr, yes: Any, no: Any) -> Scalar:
    """Either, of which only one may be read."""
    with p.emission.lazily():
        a: Scalar = yes()
    with p.emission.lazily():
        b: Scalar = no()
    imag = None if a.imag is None else T.if_then_else(condition, a.imag, b.imag)
    return Scalar(a.dtype, T.if_then_else(condition, a.expr, b.expr), imag)


def _joined(op: Op, arguments: Any) -> tuple[list[Value], int]:
    """The pieces of a cat without those that torch ignores, and the axis."""
    rank = len(op.outputs[0].shape)
    pieces = [v for v in arguments["tensors"] if len(v.shape) == rank or v.shape != (0,)]
    return pieces, wrap(arguments["dim"], rank)


@moves("cat", "concatenate", "concat")
def cat(p: Point) -> Scalar:
    pieces, axis = _joined(p.op, p.emission.named(p.op))
    at = p.at[axis]

    def piece(value: Value, start: Index) -> Scalar:
        inside = ix.sub(at, start)
        low = max(0, inside.low) if inside.low is not None else 0
        inside = Index(inside.expr, inside.key, low, inside.high)
        return sc.cast(p.read(value, _replaced(p.at, axis, inside)), p.dtype)

    def pick(number: int, start: Index) -> Scalar:
        value = pieces[number]
        stop = ix.add(start, p.size(value.shape[axis]))
        if number == len(pieces) - 1 or (
            at.high is not None and stop.low is not None and at.high < stop.low
        ):
            return piece(value, start)
        if at.low is not None and stop.high is not None and at.low >= stop.high:
            return pick(number + 1, stop)
        if stop.known is not None:
            p.emission.split(at, stop.known)
        return branch(
            p, at.expr < stop.expr, lambda: piece(value, start), lambda: pick(number + 1, stop)
        )

    return pick(0, ix.const(0))


def write_cat(e: Emission, op: Op) -> None:
    """As a kernel: one nest of loops a piece."""
    pieces, axis = _joined(op, e.named(op))
    start = ix.const(0)
    for value in pieces:

        def body(at: Position, value: Value = value, start: Index = start) -> None:
            x = sc.cast(e.read(value, at), op.outputs[0].dtype)
            e.store(op.outputs[0], _replaced(at, axis, ix.add(at[axis], start)), x)

        e.elements(value.shape, body)
        start = ix.add(start, e.sizes.index(value.shape[axis]))


for _name in ("cat", "concatenate", "concat"):
    EMIT[f"aten.{_name}.default"] = Rule(
        point=cat, kernel=write_cat, cost=0, same_position=False, exact=True, fuses=("tensors",)
    )


@moves("stack")
def stack(p: Point) -> Scalar:
    axis = wrap(p["dim"], len(p.at))
    at, inner = p.at[axis], (*p.at[:axis], *p.at[axis + 1 :])
    pieces = p["tensors"]

    def pick(number: int) -> Scalar:
        if number == len(pieces) - 1 or at.known == number:
            return sc.cast(p.read(pieces[number], inner), p.dtype)
        if at.low is not None and at.low > number:
            return pick(number + 1)
        p.emission.split(at, number + 1)
        return branch(
            p,
            at.expr < number + 1,
            lambda: sc.cast(p.read(pieces[number], inner), p.dtype),
            lambda: pick(number + 1),
        )

    return pick(0)


def write_stack(e: Emission, op: Op) -> None:
    axis = wrap(e.named(op)["dim"], len(op.outputs[0].shape))
    for number, value in enumerate(e.named(op)["tensors"]):

        def body(at: Position, value: Value = value, number: int = number) -> None:
            x = sc.cast(e.read(value, at), op.outputs[0].dtype)
            e.store(op.outputs[0], (*at[:axis], ix.const(number), *at[axis:]), x)

        e.elements(value.shape, body)


EMIT["aten.stack.default"] = Rule(
    point=stack, kernel=write_stack, cost=0, same_position=False, exact=True, fuses=("tensors",)
)


@moves("constant_pad_nd")
def pad(p: Point) -> Scalar:
    value = p["self"]
    at, inside = list(p.at), tirx.const(True, "bool")
    for pair in range(len(p["pad"]) // 2):
        axis = len(at) - 1 - pair
        before = p.emission.sizes.expr(p["pad"][2 * pair])
        size = p.emission.sizes.expr(value.shape[axis])
        place = p.emission.bind_expr(at[axis].expr - before)
        at[axis] = Index(place, ("pad", p.at[axis].key, str(p["pad"][2 * pair])))
        inside = tirx.And(inside, tirx.And(place >= 0, place < size))
    return branch(
        p, inside, lambda: p.read(value, tuple(at)), lambda: sc.constant(p["value"], p.dtype)
    )


@moves("slice_scatter")
def slice_scatter(p: Point) -> Scalar:
    src = p["src"]
    axis = wrap(p["dim"], len(p.at))
    start = offset(p, p["start"], p.shape[axis])
    back = p.emission.bind_expr(p.at[axis].expr - start.expr)
    step = tirx.const(p["step"], "int64")
    place = back if p["step"] == 1 else p.emission.bind_expr(tirx.floordiv(back, step))
    inside = tirx.And(back >= 0, place < p.emission.sizes.expr(src.shape[axis]))
    if p["step"] != 1:
        inside = tirx.And(inside, tirx.EQ(tirx.floormod(back, step), tirx.const(0, "int64")))
    there = Index(place, ("scatter", p.at[axis].key, start.key, p["step"]))
    return branch(
        p,
        inside,
        lambda: sc.cast(p.read(src, _replaced(p.at, axis, there)), p.dtype),
        lambda: p.read(p["self"], p.at),
    )


@moves("select_scatter")
def select_scatter(p: Point) -> Scalar:
    axis = wrap(p["dim"], len(p.at))
    place = offset(p, p["index"], p.shape[axis])
    inner = (*p.at[:axis], *p.at[axis + 1 :])
    return branch(
        p,
        tirx.EQ(p.at[axis].expr, place.expr),
        lambda: sc.cast(p.read(p["src"], inner), p.dtype),
        lambda: p.read(p["self"], p.at),
    )


@point("tril", "triu", exact=True, same_position=False)
def triangle(p: Point) -> Scalar:
    above = p.at[-1].expr - p.at[-2].expr
    limit = p.emission.sizes.expr(p["diagonal"])
    kept = above <= limit if p.op.name == "aten.tril.default" else above >= limit
    return choose(kept, p.read(p["self"], p.at), sc.constant(0, p.dtype))


@point("nn.rotary", cost=4, same_position=False)
def rotary(p: Point) -> Scalar:
    """Either member of a pair (a, b): a * cos - b * sin, or b * cos + a * sin."""
    x, cos, sin = p.op.inputs
    half = ix.const(p.shape[-1] // 2)
    kind = "f64" if x.dtype == "f64" else "f32"

    def turned(pair: Index, first: bool) -> Scalar:
        if p.op.attrs.get("pairs", "halves") == "halves":
            places = (pair, ix.add(pair, half))
        else:
            twice = ix.mul(pair, ix.const(2))
            places = (twice, ix.add(twice, ix.const(1)))
        a, b = (p.read(x, (*p.at[:-1], place)).expr for place in places)
        doubled = cos.shape[-1] == x.shape[-1] and not first
        at = ix.add(pair, half) if doubled else pair
        tables = [
            sc.cast(p.read(t, p.emission.position(t, (*p.at[:-1], at), p.shape)), kind).expr
            for t in (cos, sin)
        ]
        expr = a * tables[0] - b * tables[1] if first else b * tables[0] + a * tables[1]
        return Scalar(p.dtype, expr)

    at = p.at[-1]
    if p.op.attrs.get("gives", "halves") == "neighbours":
        pair = ix.div(at, ix.const(2))
        even = tirx.EQ(ix.mod(at, ix.const(2)).expr, tirx.const(0, "int64"))
        return choose(even, turned(pair, True), turned(pair, False))
    middle = half.known
    assert middle is not None
    if at.high is not None and at.high < middle:
        return turned(at, True)
    second = ix.sub(at, half)
    second = Index(second.expr, second.key, max(0, second.low or 0), second.high)
    if at.low is not None and at.low >= middle:
        return turned(second, False)
    p.emission.split(at, middle)
    return branch(p, at.expr < half.expr, lambda: turned(at, True), lambda: turned(second, False))


# ---- complex pairs ---------------------------------------------------------------------


@moves("view_as_complex", "view_as_complex_copy")
def view_as_complex(p: Point) -> Scalar:
    real, imag = (p.read(p["self"], (*p.at, ix.const(part))) for part in (0, 1))
    return Scalar("c64", real.expr, imag.expr)


@moves("view_as_real", "view_as_real_copy")
def view_as_real(p: Point) -> Scalar:
    x = p.read(p["self"], p.at[:-1])
    if p.at[-1].known is not None:
        return Scalar("f32", x.imag if p.at[-1].known else x.expr)
    return Scalar("f32", T.Select(tirx.EQ(p.at[-1].expr, tirx.const(0, "int64")), x.expr, x.imag))


@moves("real", "imag")
def real(p: Point) -> Scalar:
    x = p.read(p["self"], p.at)
    return Scalar("f32", x.imag if p.op.name == "aten.imag.default" else x.expr)


# ---- from nothing ----------------------------------------------------------------------


def _constant(*names: str, value: float | None = None, argument: str = "") -> None:
    @point(*names, cost=0, exact=True)
    def constant(p: Point) -> Scalar:
        if value is not None:
            return sc.constant(value, p.dtype)
        return sc.rounded(p.get(p[argument], p.dtype))


_constant(
    "zeros",
    "zeros_like",
    "new_zeros",
    "empty.memory_format",
    "empty_like",
    "new_empty",
    "empty_permuted",
    "new_empty_strided",
    "empty_strided",
    value=0,
)
_constant("ones", "ones_like", "new_ones", value=1)
_constant("full", "full_like", "new_full", argument="fill_value")
_constant("scalar_tensor", argument="s")
_constant("fill.Scalar", "fill.Tensor", argument="value")


@point("arange", "arange.start", "arange.start_step", cost=0, exact=True, same_position=False)
def arange(p: Point) -> Scalar:
    named = p.emission.named(p.op)
    start, step = named.get("start", 0), named.get("step", 1)
    place = Scalar("i64", p.at[0].expr)
    if start == 0 and step == 1:
        return sc.cast(place, p.dtype)
    if p.dtype in sc.INTS:
        exprs = [p.emission.sizes.expr(v) for v in (start, step)]
        return sc.cast(Scalar("i64", exprs[0] + place.expr * exprs[1]), p.dtype)
    wide = sc.cast(place, "f64").expr
    first, by = (p.get(v, "f64").expr for v in (start, step))
    return sc.cast(Scalar("f64", first + wide * by), p.dtype)


@point("eye", "eye.m", cost=0, exact=True, same_position=False)
def eye(p: Point) -> Scalar:
    return sc.cast(Scalar("bool", tirx.EQ(p.at[0].expr, p.at[1].expr)), p.dtype)
