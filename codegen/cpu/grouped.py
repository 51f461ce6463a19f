"""Products of each expert's rows with that expert's weights; rows lie sorted by expert.

    y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]

"row of r" is r itself, or, where the dispatch is folded in, the token order[r] // top_k: then
the rows of x are read where they are and never copied. Rows that no expert owns become 0; with
`cleared` false, where nobody reads them, they are left as they are.

The threads share out (tile, expert) pairs, tiles outermost: whatever the routing, each thread
gets every expert's rows for its share of the columns, so the load is even without any planning.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu.layout import Layout, LinearSpec
from moec.codegen.cpu.tile import Epilogue, Operands, Tile
from moec.codegen.cpu.vector import Vector
from moec.target import Target


def grouped_linear(
    target: Target,
    spec: LinearSpec,
    epilogue: Epilogue | None = None,
    name: str = "grouped",
    cleared: bool = True,
) -> PrimFunc:
    """A kernel (x[R, k], ends i32[E], w packed[, bias packed], y[R, n])."""
    return _grouped(target, spec, epilogue, name, None, None, cleared)


def gathered_linear(
    target: Target,
    spec: LinearSpec,
    top_k: int,
    epilogue: Epilogue | None = None,
    scale_dtype: str | None = None,
    name: str = "gathered",
    cleared: bool = True,
) -> PrimFunc:
    """A kernel (x[T, k], order i32[R], ends i32[E], w packed[, bias packed][, scale], y[R, n]).

    With `scale_dtype`, scale[T, top_k] multiplies the row of x that its choice takes (the
    product is scaled before the bias is added, which is the same).
    """
    return _grouped(target, spec, epilogue, name, top_k, scale_dtype, cleared)


def _grouped(
    target: Target,
    spec: LinearSpec,
    epilogue: Epilogue | None,
    name: str,
    top_k: int | None,
    scale_dtype: str | None,
    cleared: bool,
) -> PrimFunc:
    if spec.gated and epilogue is None:
        raise ValueError(f"{name}: gate and up need an epilogue that joins them")
    layout, v, experts = Layout(spec, target), Vector(target), spec.groups
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            t, r = T.int64(), T.int64()
            x_rows = r if top_k is None else t
            x = T.match_buffer(T.arg("x", T.handle()), (x_rows, spec.k), spec.dtype)
            order = None
            if top_k is not None:
                order = T.match_buffer(T.arg("order", T.handle()), (r,), "int32")
            ends = T.match_buffer(T.arg("ends", T.handle()), (experts,), "int32")
            w = T.match_buffer(T.arg("w", T.handle()), layout.shape, layout.dtype)
            bias = scale = None
            if spec.bias:
                bias = T.match_buffer(T.arg("bias", T.handle()), layout.bias_shape, "float32")
            if scale_dtype is not None and top_k is not None:
                scale = T.match_buffer(T.arg("scale", T.handle()), (t, top_k), scale_dtype)
            y = T.match_buffer(T.arg("y", T.handle()), (r, spec.n), spec.y_dtype)
            tile = Tile(layout, _operands(v, x, w, y, bias, order, scale, top_k), epilogue)
            with v.functions(), T.parallel(0, layout.tiles * experts) as unit:
                column = T.bind(T.truncdiv(unit, experts))
                e = T.bind(T.truncmod(unit, experts))
                before = T.if_then_else(e > 0, ends[T.max(e - 1, 0)], 0)
                first = T.bind(T.cast(before, "int64"))
                end = T.bind(T.cast(ends[e], "int64"))
                with T.If(first < end), T.Then():
                    tile.rows(e, column, first, end - first)
                if cleared:
                    with T.If(e == experts - 1), T.Then():
                        tile.zero_rows(column, end, r - end)
    return builder.get()


def _operands(
    v: Vector,
    x: Buffer,
    w: Buffer,
    y: Buffer,
    bias: Buffer | None,
    order: Buffer | None,
    scale: Buffer | None,
    top_k: int | None,
) -> Operands:
    if order is None or top_k is None:
        return Operands(x, w, y, bias, lambda r: r, None)

    def token(r: Expr) -> Expr:
        return T.cast(T.truncdiv(order[r], top_k), "int64")

    def row_scale(r: Expr) -> Expr:
        return v.scalar(scale, [token(r), T.cast(T.truncmod(order[r], top_k), "int64")])

    return Operands(x, w, y, bias, token, None if scale is None else row_scale)
