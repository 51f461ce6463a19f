"""Kernels of grouped products with quantised weights, and their arguments: see tile.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu.frame import argument
from moec.codegen.cpu.gemm.product import ProductOutput, TileProduct
from moec.codegen.cpu.gemm.sorted_rows import sorted_product
from moec.codegen.cpu.gemm.tile import Epilogue, Operands, Tile
from moec.codegen.cpu.quantised.amx_fp8_tile import AmxFp8Tile
from moec.codegen.cpu.quantised.amx_tile import AmxQuantisedTile
from moec.codegen.cpu.quantised.fp8_tile import Fp8Tile, Fp8WidenedTile
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.cpu.quantised.round_rows import RoundedRows
from moec.codegen.cpu.quantised.tile import QuantisedOperands, QuantisedTile
from moec.codegen.specs.products import QuantisedSpec
from moec.target.cpu import CpuTarget


@dataclass(frozen=True)
class QuantisedWeights:
    """Packed codes and scales, and zeros if the format has them."""

    codes: Buffer
    scales: Buffer
    zeros: Buffer | None

    @staticmethod
    def of(lay: QuantisedLayout, suffix: str, groups: Expr | int) -> QuantisedWeights:
        zeros, format = f"zeros{suffix}", lay.spec.format
        zero_dtype = lay.scale_dtype if format.float_zeros else "uint8"
        scales = (groups, *lay.scale_shape[1:])
        return QuantisedWeights(
            argument(f"w{suffix}", (groups, *lay.shape[1:]), lay.dtype),
            argument(f"w_scales{suffix}", scales, lay.scale_dtype),
            argument(zeros, scales, zero_dtype) if format.asymmetric else None,
        )


def quantised_product(
    target: CpuTarget, spec: QuantisedSpec, epilogue: Epilogue | None = None
) -> TileProduct[Any, QuantisedWeights]:
    """A product of rows that are rounded to codes, or with fp8 weights of rows of floats."""
    lay = QuantisedLayout(spec, target)

    def rows(count: Expr) -> Any:
        if lay.floats:
            return argument("x", (count, spec.k), spec.dtype)
        return RoundedRows.of(count, spec.k, lay.blocks, lay.row_codes)

    def tile(x: Any, w: QuantisedWeights, out: ProductOutput) -> Tile:
        if lay.floats:
            floats = lay, Operands(x, w.codes, *out), epilogue
            if not (lay.pairs and target.bf16_dot):
                return Fp8WidenedTile(*floats, w.scales)
            dots = Fp8Tile(*floats, w.scales)
            return AmxFp8Tile(*floats, dots) if lay.float_tiles else dots
        return quantised_tile(lay, x, w, out, epilogue)

    return TileProduct(
        lay,
        rows,
        lambda suffix, groups: QuantisedWeights.of(lay, suffix, groups),
        tile,
    )


def quantised_tile(
    lay: QuantisedLayout,
    x: RoundedRows,
    w: QuantisedWeights,
    out: ProductOutput,
    epilogue: Epilogue | None,
) -> Tile:
    """The tile of rows that are rounded to codes."""
    operands = QuantisedOperands(x.codes, w.codes, *out, x.scales, x.sums, w.scales, w.zeros)
    kind = AmxQuantisedTile if lay.amx else QuantisedTile
    return kind(lay, operands, epilogue)


def quantised_linear(
    target: CpuTarget,
    spec: QuantisedSpec,
    top_k: int = 0,
    epilogue: Epilogue | None = None,
    scale_dtype: str | None = None,
    name: str = "quantised",
    *,
    from_slots: bool = False,
) -> PrimFunc:
    """A kernel (codes, scales, sums of x[T, k][, order i32[R]], ends i32[E][, key, plan], w, its
    scales[, its zeros][, bias packed][, scale[T, top_k]], y[R, n]), as documented in
    `sorted_product`; with fp8 weights x[T, k] itself."""
    if spec.gated and epilogue is None:
        raise ValueError(f"{name}: gate and up need an epilogue that joins them")
    product = quantised_product(target, spec, epilogue)
    return sorted_product(product, name, top_k, scale_dtype, from_slots=from_slots)
