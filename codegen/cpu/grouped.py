"""Products of each expert's rows with that expert's weights; rows lie sorted by expert.

    y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]

"row of r" is r itself, or, where the dispatch is folded in, the token order[r] // top_k: then
the rows of x are read where they are and never copied. Rows that no expert owns become 0; with
`cleared` false, where nobody reads them, they are left as they are.
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cpu.amx import tile_for
from moec.codegen.cpu.layout import Layout, LinearSpec
from moec.codegen.cpu.sorted_rows import each_expert, scale_of, token_of
from moec.codegen.cpu.tile import Epilogue, Operands
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
            tokens, scales = token_of(order, top_k), scale_of(v, scale, order, top_k)
            operands = Operands(x, w, y, bias, tokens, scales, gathered=order is not None)
            tile = tile_for(layout, operands, epilogue)
            with v.functions():
                each_expert(tile, ends, r, cleared, fetches=True)
    return builder.get()
