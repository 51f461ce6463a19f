"""Dense products of rows of codes with weights of few bits: several of the same rows, one kernel.

    y[T, n] = (sum of blocks b: sx[row, b] * sw[b] * (x[row, b] . (w[b] - z[b]))) + bias

The tile is that of experts (quantised.py), the sharing out of tiles and chunks of rows that of
other dense products (linear.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import integers
from moec.codegen.cpu.linear import shared_out
from moec.codegen.cpu.quantised import QuantisedOperands, QuantisedTile
from moec.codegen.cpu.quantised_layout import QuantisedLayout, QuantisedSpec
from moec.codegen.cpu.vector import Vector
from moec.target import Target


def quantised_linears(
    target: Target, specs: tuple[QuantisedSpec, ...], name: str = "quantised_linears"
) -> PrimFunc:
    """A kernel (codes, scales, sums of x[T, k], (w, its scales[, its zeros][, bias packed]) of
    each product, y[T, n] of each)."""
    if len({(spec.k, spec.format.block) for spec in specs}) != 1:
        raise ValueError(f"{name}: the products are of rows of other widths or blocks")
    if any(spec.groups != 1 or spec.gated for spec in specs):
        raise ValueError(f"{name}: the products must be dense, each with one matrix")
    layouts = [QuantisedLayout(spec, target) for spec in specs]
    first = layouts[0]
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            t, v = T.int64(), Vector(target)

            def argument(name: str, shape: Sequence[Expr | int], dtype: str) -> Buffer:
                return T.match_buffer(T.arg(name, T.handle()), shape, dtype)

            x = argument("x", (t, first.x_words), "int32")
            x_scales = argument("x_scales", (t, first.blocks), "float32")
            sums = argument("sums", (t, first.blocks), "int32")
            weights: list[tuple[Buffer, Buffer, Buffer | None, Buffer | None]] = []
            for i, lay in enumerate(layouts):
                w = argument(f"w{i}", lay.shape, lay.dtype)
                scales = argument(f"w_scales{i}", lay.scale_shape, lay.scale_dtype)
                asymmetric, biased = lay.spec.format.asymmetric, lay.spec.bias
                zeros = argument(f"zeros{i}", lay.scale_shape, "uint8") if asymmetric else None
                bias = argument(f"bias{i}", lay.bias_shape, "float32") if biased else None
                weights.append((w, scales, zeros, bias))
            tiles = []
            for i, (lay, (w, scales, zeros, bias)) in enumerate(zip(layouts, weights, strict=True)):
                y = argument(f"y{i}", (t, lay.spec.n), lay.spec.y_dtype)
                operands = QuantisedOperands(
                    x, w, y, bias, lambda r: r, None, x_scales, sums, scales, zeros
                )
                tiles.append(QuantisedTile(lay, operands, None))
            with integers.functions(v):
                shared_out(tiles, t)
    return builder.get()
