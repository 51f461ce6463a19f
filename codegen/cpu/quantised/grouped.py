"""Kernels of grouped products with quantised weights, and their arguments: see tile.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu.frame import argument
from moec.codegen.cpu.gemm.amx_tile import MOST_ROWS, STEPS, AmxRows, AmxTile, DepthSteps
from moec.codegen.cpu.gemm.linear import dense_products
from moec.codegen.cpu.gemm.product import ProductOutput, TileProduct
from moec.codegen.cpu.gemm.sorted_rows import sorted_product
from moec.codegen.cpu.gemm.tile import Epilogue, Operands, RowRun, Tile
from moec.codegen.cpu.quantised.amx_tile import AmxQuantisedTile
from moec.codegen.cpu.quantised.fp8_tile import CODES, Fp8Tile, Fp8WidenedTile, scales_of
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.cpu.quantised.round_rows import RoundedRows
from moec.codegen.cpu.quantised.tile import QuantisedOperands, QuantisedTile
from moec.codegen.specs.products import QuantisedSpec
from moec.target.cpu import CpuTarget

# The register tile of e4m3 weights on AMX: a block of weights becomes bf16 once, for all rows.
#
#     y[r] = f((sum of blocks b: sw[b] * (x[row, b] . e4m3(w[e, b]))) + bias[e])
#
# The codes of a block of K are widened to pairs of bf16, which is exact, in a panel in the cache
# that tile registers read as they read packed weights. The sum of a block is multiplied with its
# scale.
#
# A panel is not worth it for FEW rows: their weights are widened in vector registers, and summed in
# the order of the instruction tdpbf16ps, for the same bits (Intel's manual, volume 2): the first
# elements of 16 pairs, the second ones, both sums together, then to the sum of the pairs before.
# The instruction takes numbers below 2^-126 as 0, vector registers do not.

WORDS = 2 * STEPS // CODES  # of a register's steps
FEW = 2


@dataclass(frozen=True)
class AmxFp8Tile(AmxTile):
    """`codes` widens weights to `panel` [words of a block, pairs of a word, columns], and `block`
    [rows, columns] has the sums of a block of K."""

    layout: QuantisedLayout
    codes: Fp8Tile
    panel: Buffer | None = None
    block: Buffer | None = None

    @property
    def block_words(self) -> int:
        """Words of a block of K: of a block of scales, or of all of K in equal parts."""
        lay = self.layout
        if lay.blocks > 1:
            return lay.depth // lay.blocks
        parts = lay.depth // WORDS
        most = max(1, lay.depth_block // WORDS)
        return WORDS * max(n for n in range(1, most + 1) if parts % n == 0)

    def rows(self, run: RowRun) -> None:
        v, columns = self.vector, self.layout.columns
        with T.If(run.count <= FEW):
            with T.Then():
                self._few(run)
            with T.Else():
                panel = v.scratch((self.block_words, CODES // 2, columns), "int32")
                block = v.scratch((MOST_ROWS, columns), "float32")
                many = replace(self, panel=panel, block=block)
                super(AmxFp8Tile, many).rows(run)

    def _few(self, run: RowRun) -> None:
        group, tile, first, count, _, tiles = run
        v, ops, k = self.vector, self.operands, self.layout.spec.k
        wide_rows = v.scratch((FEW, k), "float32")
        with T.serial(0, count) as i:
            source = T.bind(ops.x_row(first + i))
            with T.serial(0, k // v.lanes) as part:
                v.store(wide_rows, [i, part * v.lanes], v.load(ops.x, [source, part * v.lanes]))
        with T.serial(0, tiles) as t:
            column_tile = T.bind(tile + t)
            for m in range(1, FEW + 1):
                with T.If(count == m), T.Then():
                    self._few_rows(group, column_tile, first, m, wide_rows)

    def _few_rows(self, group: Expr, tile: Expr, first: Expr, m: int, x: Buffer) -> None:
        v, lay, words = self.vector, self.layout, self.block_words
        lanes = T.ramp(0, 1, v.lanes)
        each = [(i, j) for i in range(m) for j in range(lay.vectors)]
        total, acc, even, odd = (
            {at: T.alloc_buffer((v.lanes,), "float32") for at in each} for _ in range(4)
        )

        def zero(*registers: dict[tuple[int, int], Buffer]) -> None:
            for register in chain.from_iterable(sums.values() for sums in registers):
                T.buffer_store(register, v.splat(0.0), [lanes])

        stream = self._weight_stream(group, tile)
        fetch = None if stream is None else self._prefetcher(stream)
        zero(total)
        with T.serial(0, lay.depth // words) as number:
            zero(acc)
            with T.serial(0, words // WORDS) as step:
                zero(even, odd)
                with T.serial(0, WORDS) as inside:
                    word = T.bind(number * words + step * WORDS + inside)
                    for half, pairs in enumerate(self.codes._weights(group, tile, word, fetch)):
                        for sums, take, offset in ((even, v.low, 0), (odd, v.high, 1)):
                            weights = [T.bind(take(pair)) for pair in pairs]
                            for i in range(m):
                                a = v.splat(T.bind(x[i, word * CODES + 2 * half + offset]))
                                row = [sums[i, j] for j in range(lay.vectors)]
                                self._accumulate(row, a, weights, self._fma)
                for at in each:
                    pair_sums = T.bind(even[at][lanes] + odd[at][lanes])
                    T.buffer_store(acc[at], acc[at][lanes] + pair_sums, [lanes])
            scales = scales_of(self.codes, group, tile, number if lay.blocks > 1 else 0)
            for i, j in each:
                added = v.fma(acc[i, j][lanes], scales[j], total[i, j][lanes])
                T.buffer_store(total[i, j], added, [lanes])
        rows = [[total[i, j] for j in range(lay.vectors)] for i in range(m)]
        self._finish(rows, first, m, group, tile)

    def _tile_sums(self, rows: AmxRows, group: Expr, tile: Expr, sums: Buffer) -> None:
        v, lay, panel, block = self.vector, self.layout, self.panel, self.block
        assert panel is not None
        assert block is not None
        words = self.block_words
        with T.serial(0, lay.depth // words) as number:
            start = T.bind(number * words)
            with T.serial(0, words) as word:
                for i, pairs in enumerate(self.codes._weights(group, tile, start + word, None)):
                    for lanes, vector in zip(self._lanes, pairs, strict=True):
                        T.buffer_store(panel, vector, [word, i, lanes])

            def weights(j: int, step: Expr) -> tuple[Expr, int]:
                return panel[step * WORDS, 0, j * v.lanes], lay.columns * 4

            steps = words // WORDS
            self._sums(rows, DepthSteps(number * steps, steps, weights), block)
            scales = scales_of(self.codes, group, tile, number if lay.blocks > 1 else 0)
            with T.serial(0, rows.count) as i:
                for lanes, scale in zip(self._lanes, scales, strict=True):
                    before = T.if_then_else(number > 0, sums[i, lanes], v.splat(0.0))
                    total = v.fma(block[i, lanes], scale, before)
                    T.buffer_store(sums, total, [i, lanes])


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


def quantised_linears(
    target: CpuTarget, specs: tuple[QuantisedSpec, ...], name: str = "quantised_linears"
) -> PrimFunc:
    """A kernel (codes, scales, sums of x[T, k], (w, its scales[, its zeros][, bias packed]) of
    each product, y[T, n] of each)."""
    if len({(spec.k, spec.format.block, spec.format.row_bits) for spec in specs}) != 1:
        raise ValueError(f"{name}: the products are of rows of other widths or blocks, or bits")
    if any(spec.groups != 1 or spec.gated for spec in specs):
        raise ValueError(f"{name}: the products must be dense, each with one matrix")
    return dense_products([quantised_product(target, spec) for spec in specs], name)
