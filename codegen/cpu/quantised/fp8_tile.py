"""The register tiles of e4m3 weights and rows of floats, which are not rounded.

    y[r] = f((sum of blocks b: sw[b] * (x[row, b] . e4m3(w[e, b]))) + bias[e])

Every value of e4m3 is a bf16 number. With dot products of bf16, the sum of a block is multiplied
with its scale; else weights are widened to float32 together with their scale, which is exact for
scales of 16 bits. Few rows widen weights in registers; many widen a block of them once, to a panel
in the cache. Both add the same products in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.gemm.prefetch import wide
from moec.codegen.cpu.gemm.tile import Fetch, Partial, Registers, RowRun, Tile
from moec.codegen.cpu.gemm.upconvert_tile import DepthBlock, Elements, WidenedTile
from moec.codegen.cpu.quantised import integers
from moec.codegen.cpu.quantised.layout import QuantisedLayout

CODES = 4  # in a word
FEW = 4  # rows beside whose sums there are registers to widen weights


@dataclass(frozen=True)
class Fp8WidenedTile(WidenedTile):
    """Weights as float32."""

    layout: QuantisedLayout
    w_scales: Buffer

    @property
    def factor(self) -> int:
        return CODES

    def _each_step(
        self, block: DepthBlock, ask: Fetch | None, action: Callable[[Expr, Elements], None]
    ) -> None:
        v, w, group, tile = self.vector, self.operands.w, block.group, block.tile
        count, size = block.stop - block.start, self.layout.depth // self.layout.blocks
        unit = size if isinstance(count, int) else 1  # all of K has whole blocks of scales
        with T.serial(0, T.truncdiv(wide(count), T.int64(unit))) as turn:
            first = T.bind(turn * unit)
            scales = scales_of(self, group, tile, T.truncdiv(block.start + first, T.int64(size)))
            factors = [T.bind(scale * v.splat(integers.E4M3_UNIT)) for scale in scales]
            with T.serial(0, T.int64(unit)) as more:
                step = T.bind(first + more)
                if ask is not None:
                    ask(step)
                words = [T.bind(w[group, tile, block.start + step, at]) for at in self._lanes]
                scaled = [
                    [T.bind(code * f) for code in integers.e4m3(v, word)]
                    for word, f in zip(words, factors, strict=True)
                ]
                action(step, [list(element) for element in zip(*scaled, strict=True)])


@dataclass(frozen=True)
class Fp8Tile(Tile):
    """Weights as pairs of bf16. If there are many rows, `panel` [words, pairs of a word, columns]
    holds those of the block of K from `start` on."""

    layout: QuantisedLayout
    w_scales: Buffer
    panel: Buffer | None = None
    start: Expr | int = 0

    @property
    def factor(self) -> int:
        return CODES

    def _rows_of(self, run: RowRun) -> None:
        shape = (self.layout.depth_block, CODES // 2, self.layout.columns)
        with T.If(run.count <= FEW):
            with T.Then():
                super()._rows_of(run)
            with T.Else():
                many = replace(self, panel=self.vector.scratch(shape, "int32"))
                super(Fp8Tile, many)._rows_of(run)

    def _ready(self, group: Expr, tile: Expr, start: Expr | int, stop: Expr | int) -> Tile:
        if self.panel is not None:
            codes = replace(self, panel=None)
            with T.serial(0, stop - start) as step:
                for i, pairs in enumerate(codes._weights(group, tile, start + step, None)):
                    for lanes, vector in zip(self._lanes, pairs, strict=True):
                        T.buffer_store(self.panel, vector, [step, i, lanes])
        return replace(self, start=start)

    def _weights(
        self, group: Expr, tile: Expr, k: Expr | int, fetch: Fetch | None
    ) -> Iterator[list[Expr]]:
        """The first and the second pair of each column's word. The prefetch is a barrier, as in
        upconvert_tile.py."""
        v, panel, w = self.vector, self.panel, self.operands.w
        words = (
            [] if panel is not None else [T.bind(w[group, tile, k, lanes]) for lanes in self._lanes]
        )
        for i in range(CODES // 2):
            if panel is not None:
                yield [T.bind(panel[k - self.start, i, lanes]) for lanes in self._lanes]
            else:
                yield [integers.e4m3_pairs(v, word, i) for word in words]
            if i == 0 and fetch is not None:
                fetch(k)

    def _summed(
        self,
        multiply: Callable[[Registers], None],
        row: Expr,
        m: int,
        group: Expr,
        tile: Expr,
        partial: Partial | None,
    ) -> None:
        """As in other tiles, with the sum of a block multiplied before it is added."""
        v, lay = self.vector, self.layout
        block = 0 if lay.blocks == 1 else T.truncdiv(self.start, T.int64(lay.depth_block))

        def before(i: int, j: int) -> Expr:
            if partial is None or partial.begun is None:
                return v.splat(0.0)
            sums = v.load(*partial.at(i, j * v.lanes))
            return T.if_then_else(partial.begun, sums, v.splat(0.0))

        def scaled(acc: Registers) -> None:
            multiply(acc)
            lanes = T.ramp(0, 1, v.lanes)
            for j, scale in enumerate(scales_of(self, group, tile, block)):
                for i, row_acc in enumerate(acc):
                    total = v.fma(row_acc[j][lanes], scale, before(i, j))
                    T.buffer_store(row_acc[j], total, [lanes])

        after = None if partial is None else replace(partial, begun=None)
        super()._summed(scaled, row, m, group, tile, after)


def scales_of(
    tile: Fp8Tile | Fp8WidenedTile, group: Expr, columns: Expr, block: Expr | int
) -> list[Expr]:
    """The scales of each vector of a tile's columns, in one block of K."""
    v = tile.vector
    starts = range(0, tile.layout.columns, v.lanes)
    return [v.load(tile.w_scales, [group, columns, block, start]) for start in starts]
