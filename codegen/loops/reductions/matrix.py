"""Products of two matrices that are computed at run time, and convolutions.

Products with weights use packed kernels (codegen/cpu). The remaining ones are small or rare: outer
products of rotary embeddings, einsum dispatch, and attention in separate ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.vector import Vector
from moec.codegen.loops import index as ix
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.elements.arithmetic import plus, times
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Index, Position, loop
from moec.codegen.loops.rules import kernel
from moec.codegen.loops.scalars import Scalar
from moec.dtypes import HALVES
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim, canonical, product

ROWS, VECTORS = 4, 2
Epilogue = Callable[[Position, Scalar], Scalar]


def _identity(at: Position, x: Scalar) -> Scalar:
    return x


def product_of(
    e: Emission,
    out: Value,
    a: Value,
    b: Value,
    *,
    transposed: bool = False,
    after: Epilogue = _identity,
) -> None:
    """out[.., m, n] = sum over k of a[.., m, k] * b[.., k, n] (b[.., n, k] if transposed).

    Sums run in float32 for half types, in the order of k. Leading axes broadcast.
    """
    vector = e.vectors and not transposed and a.dtype == b.dtype and a.dtype in ("f32", *HALVES)
    if vector and len(a.shape) >= 2 and len(b.shape) >= 2:
        _tiles(e, out, a, b, after)
        return
    kind = "f32" if out.dtype in HALVES else out.dtype
    depth = a.shape[-1]

    def body(at: Position) -> None:
        total = e.cell(sc.constant(0, kind))
        with T.serial(0, e.sizes.expr(depth)) as k, e.scope():
            inner = loop(k, "inner", depth)
            x = sc.cast(e.read(a, (*_lead(e, a, out, at), *at[-2:-1], inner)), kind)
            last = (at[-1], inner) if transposed else (inner, at[-1])
            y = sc.cast(e.read(b, (*_lead(e, b, out, at), *last)), kind)
            total.set(plus(total.get(), times(x, y)))
        e.store(out, at, sc.cast(after(at, total.get()), out.dtype))

    e.elements(out.shape, body, weight=8)


def _lead(e: Emission, value: Value, out: Value, at: Position) -> Position:
    """The position of the leading axes of an operand that is broadcast to the output's batch."""
    lead_shape, batch = value.shape[:-2], at[:-2]
    skip = len(batch) - len(lead_shape)
    return tuple(ix.const(0) if dim == 1 else batch[skip + i] for i, dim in enumerate(lead_shape))


def _tiles(e: Emission, out: Value, a: Value, b: Value, after: Epilogue) -> None:
    """Register tiles of ROWS rows and VECTORS vectors; narrower ones at the edges."""
    v = Vector(e.target)
    lanes, depth = v.lanes, a.shape[-1]
    rows, columns = out.shape[-2], out.shape[-1]
    m, n, depth_expr = (e.sizes.expr(d) for d in (rows, columns, depth))
    blocks = _blocks(rows)

    def tile(at: Position, row: Expr, height: int, column: Expr, count: Expr | None) -> None:
        width = 1 if count is not None else VECTORS
        cells = [[e.scratch((lanes,), "float32") for _ in range(width)] for _ in range(height)]
        ramp = T.ramp(0, 1, lanes)
        for cell in (c for line in cells for c in line):
            T.buffer_store(cell, v.splat(0.0), [ramp])
        lead_a = [i.expr for i in _lead(e, a, out, at)]
        lead_b = [i.expr for i in _lead(e, b, out, at)]
        with T.serial(0, depth_expr) as k:
            line = [
                v.load(e.buffers[b], [*lead_b, k, column + j * lanes])
                if count is None
                else v.load_tail(e.buffers[b], [*lead_b, k, column], count)
                for j in range(width)
            ]
            for i in range(height):
                x = v.splat(v.scalar(e.buffers[a], [*lead_a, row + i, k]))
                for j in range(width):
                    T.buffer_store(cells[i][j], v.fma(x, line[j], cells[i][j][ramp]), [ramp])
        for i in range(height):
            for j in range(width):
                start = column + j * lanes
                with T.serial(0, lanes if count is None else count) as lane, e.scope():
                    column_index = Index(T.bind(start + T.cast(lane, "int64")), ("column", i, j))
                    to = (*at[:-2], Index(row + i, ("row", i)), column_index)
                    total = Scalar("f32", cells[i][j][lane])
                    e.store(out, to, sc.cast(after(to, total), out.dtype))

    def strip(at: Position, row: Expr, height: int) -> None:
        full_blocks = tirx.truncdiv(n, _i(lanes * VECTORS))
        with T.serial(0, full_blocks) as block:
            tile(at, row, height, T.bind(block * (lanes * VECTORS)), None)
        with T.serial(0, VECTORS) as part:
            column = T.bind(full_blocks * (lanes * VECTORS) + T.cast(part, "int64") * lanes)
            with T.If(column < n), T.Then():
                tile(at, row, height, column, tirx.min(n - column, _i(lanes)))

    def body(at: Position) -> None:
        row = T.bind(at[-2].expr * ROWS)
        with T.If(row + ROWS <= m):
            with T.Then():
                strip(at, row, ROWS)
            with T.Else(), T.serial(0, m - row) as rest:
                strip(at, T.bind(row + rest), 1)

    def outer(at: Position) -> None:
        body((*at[:-1], at[-1], ix.const(0)))

    shape = (*out.shape[:-2], blocks)
    e.rows(shape, outer, product((columns, depth)), weight=ROWS)


def _blocks(rows: Dim) -> Dim:
    from sympy import Integer, ceiling

    return -(-rows // ROWS) if isinstance(rows, int) else ceiling(rows / Integer(ROWS))


def _i(value: int) -> Expr:
    return tirx.const(value, "int64")


@kernel("mm", "bmm")
def mm(e: Emission, op: Op) -> None:
    named = e.named(op)
    product_of(e, op.outputs[0], named["self"], named["mat2"])


@kernel("matmul")
def matmul(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, a, b = op.outputs[0], named["self"], named["other"]
    if len(b.shape) == 1:
        _sums(e, out, a.shape[-1], lambda at, k: (e.read(a, (*at, k)), e.read(b, (k,))))
    elif len(a.shape) == 1:
        _sums(
            e, out, a.shape[-1], lambda at, k: (e.read(a, (k,)), e.read(b, (*at[:-1], k, at[-1])))
        )
    else:
        product_of(e, out, a, b)


@kernel("linear")
def linear(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, bias = op.outputs[0], named["bias"]

    def add_bias(at: Position, x: Scalar) -> Scalar:
        if bias is None:
            return x
        return plus(x, sc.cast(e.read(bias, at[-1:]), x.dtype))

    product_of(e, out, named["input"], named["weight"], transposed=True, after=add_bias)


@kernel("addmm", "baddbmm")
def addmm(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, addend = op.outputs[0], named["self"]
    first = named.get("mat1", named.get("batch1"))
    second = named.get("mat2", named.get("batch2"))
    alpha, beta = named["alpha"], named["beta"]

    def add_scaled(at: Position, x: Scalar) -> Scalar:
        if alpha != 1:
            x = times(x, sc.constant(alpha, x.dtype))
        if beta == 0:
            return x
        y = sc.cast(e.read(addend, e.position(addend, at, out.shape)), x.dtype)
        return plus(x, y if beta == 1 else times(y, sc.constant(beta, x.dtype)))

    product_of(e, out, first, second, after=add_scaled)


@kernel("mv", "dot")
def mv(e: Emission, op: Op) -> None:
    named = e.named(op)
    a, b = named["self"], named.get("vec", named.get("tensor"))
    _sums(e, op.outputs[0], b.shape[0], lambda at, k: (e.read(a, (*at, k)), e.read(b, (k,))))


def _sums(
    e: Emission, out: Value, depth: Dim, factors: Callable[[Position, Index], tuple[Scalar, Scalar]]
) -> None:
    """Each element of `out` is a sum over k of products, in the order of k; one operand is a
    vector. Half types are summed in float32."""
    kind = "f32" if out.dtype in HALVES else out.dtype

    def body(at: Position) -> None:
        total = e.cell(sc.constant(0, kind))
        with T.serial(0, e.sizes.expr(depth)) as k, e.scope():
            x, y = factors(at, loop(k, "inner", depth))
            total.set(plus(total.get(), times(sc.cast(x, kind), sc.cast(y, kind))))
        e.store(out, at, sc.cast(total.get(), out.dtype))

    e.elements(out.shape, body, weight=8)


# ---- convolution -----------------------------------------------------------------------


@kernel("convolution", "conv1d", "conv2d")
def convolution(e: Emission, op: Op) -> None:
    """x[N, C, ...], weight[O, C / groups, ...] -> [N, O, ...]; any number of spatial axes."""
    named = e.named(op)
    x, weight, bias = named["input"], named["weight"], named["bias"]
    out, rank = op.outputs[0], len(named["input"].shape) - 2
    stride, padding, dilation = (
        _spread(named[name], rank) for name in ("stride", "padding", "dilation")
    )
    kind = "f32" if out.dtype in HALVES else out.dtype
    group_in, group_out = map(
        e.sizes.index, (weight.shape[1], canonical(weight.shape[0] // named["groups"]))
    )

    def body(at: Position) -> None:
        total = e.cell(sc.constant(0, kind))
        first = ix.mul(ix.div(at[1], group_out), group_in)

        def tap(inner: Position) -> None:
            taps, inside = [], tirx.const(True, "bool")
            for axis in range(rank):
                expr = at[2 + axis].expr * stride[axis] + inner[1 + axis].expr * dilation[axis]
                coordinate = e.bind_expr(expr - e.sizes.expr(padding[axis]))
                size = e.sizes.expr(x.shape[2 + axis])
                inside = tirx.And(inside, tirx.And(coordinate >= 0, coordinate < size))
                taps.append(Index(coordinate, ("tap", at[2 + axis].key, inner[1 + axis].key)))
            with T.If(inside), T.Then(), e.scope():
                channel = ix.add(first, inner[0])
                element = sc.cast(e.read(x, (at[0], channel, *taps)), kind)
                factor = sc.cast(e.read(weight, (at[1], *inner)), kind)
                total.set(plus(total.get(), times(element, factor)))

        e.serially(weight.shape[1:], tap, "tap")
        result = total.get()
        if bias is not None:
            result = plus(result, sc.cast(e.read(bias, (at[1],)), kind))
        e.store(out, at, sc.cast(result, out.dtype))

    e.elements(out.shape, body, weight=16)


def _spread(value: Any, rank: int) -> Sequence[int]:
    values = value if isinstance(value, tuple) else (value,)
    return values * rank if len(values) == 1 else values
