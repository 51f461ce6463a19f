"""Dense products: y[T, n] = f(x[T, k] @ w^T + bias), parallel over tiles of columns and of rows.

The threads share out (tile, chunk of rows) pairs, tiles outermost: neighbouring pairs use the
same weights, which then stay in one core's cache.
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cpu.layout import Layout, LinearSpec
from moec.codegen.cpu.tile import ROW_CHUNK, Epilogue, Operands, Tile
from moec.codegen.cpu.vector import Vector
from moec.target import Target


def linear(
    target: Target, spec: LinearSpec, epilogue: Epilogue | None = None, name: str = "linear"
) -> PrimFunc:
    """A kernel (x[T, k], w packed[, bias packed], y[T, n]).

    `spec.groups` is 1. `epilogue` maps the float32 vector of sums (gated: the two vectors gate
    and up) to the vector that is rounded to y; it is called while the kernel is built.
    """
    if spec.groups != 1:
        raise ValueError(f"{name}: a dense product has one group of weights, not {spec.groups}")
    if spec.gated and epilogue is None:
        raise ValueError(f"{name}: gate and up need an epilogue that joins them")
    layout = Layout(spec, target)
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            t = T.int64()
            x = T.match_buffer(T.arg("x", T.handle()), (t, spec.k), spec.dtype)
            w = T.match_buffer(T.arg("w", T.handle()), layout.shape, layout.dtype)
            bias = None
            if spec.bias:
                bias = T.match_buffer(T.arg("bias", T.handle()), layout.bias_shape, "float32")
            y = T.match_buffer(T.arg("y", T.handle()), (t, spec.n), spec.y_dtype)
            tile = Tile(layout, Operands(x, w, y, bias, lambda r: r, None), epilogue)
            chunks = T.truncdiv(t + (ROW_CHUNK - 1), T.int64(ROW_CHUNK))
            with Vector(target).functions(), T.parallel(0, chunks * layout.tiles) as unit:
                column = T.bind(T.cast(T.truncdiv(unit, chunks), "int32"))
                first = T.bind(T.truncmod(unit, chunks) * ROW_CHUNK)
                count = T.bind(T.min(t - first, T.int64(ROW_CHUNK)))
                tile.rows(T.int32(0), column, first, count)
    return builder.get()
