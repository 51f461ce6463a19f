"""The register tile of 16-bit floats without dot products: converted to float32, then multiplied.

A conversion takes about as long as a product, so each number is converted once for many products:

    many rows   a block of K of all rows becomes a panel in the L2 cache, for some tiles of weights;
                that of a tile of weights becomes a panel in the L1 cache, for all rows
    few rows    the rows become a panel, and weights are converted as they are loaded

Both add the same products in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.gemm.prefetch import Following, wide
from moec.codegen.cpu.gemm.row_blocks import ceil_of, ceildiv, each_row_block, stop_of
from moec.codegen.cpu.gemm.tile import PARTIAL_ROWS, Fetch, Partial, Registers, RowRun, Tile, Where

WEIGHTS = 16 * 1024  # bytes of a panel of weights, half of a small L1 cache
MORE = 4  # times as many tiles at once as in other kernels

Elements = list[list[Expr]]  # of a step of K, in order: the weights of each vector of a tile


@dataclass(frozen=True)
class DepthBlock:
    """Steps `start` .. `stop` of K, of the weights of one tile."""

    group: Expr
    tile: Expr
    start: Expr | int
    stop: Expr | int


@dataclass(frozen=True)
class WidenedTile(Tile):
    """Emits the loops over rows and K for some tiles of columns."""

    @property
    def factor(self) -> int:
        return 2 if self.layout.pairs else 1

    @property
    def steps(self) -> int:
        """Steps of a block of K: a multiple of full vectors of rows and of weights."""
        lay = self.layout
        elements = min(256, max(128, WEIGHTS // (4 * lay.columns)))
        steps = ceil_of(lay.depth, ceil_of(lay.depth, elements // self.factor))
        return ceil_of(steps, self.vector.lanes) * self.vector.lanes

    @property
    def tiles_at_once(self) -> int:
        """More than in other kernels, as rows are converted once for all of them, unless that
        leaves fewer pieces to share among threads."""
        lay = self.layout
        enough = max(1, lay.tiles * lay.spec.groups // 256)
        return min(lay.tiles, MORE * super().tiles_at_once, enough)

    @property
    def dense_tiles(self) -> int:
        return min(self.layout.tiles, 2 * MORE)

    def rows(self, run: RowRun) -> None:
        group, tile, first, count, following, tiles = run
        height, depth = self.layout.target.tile_rows, self.layout.depth
        full_block = DepthBlock(group, tile, 0, depth)
        with T.If(count < height):
            with T.Then():
                panel = self.vector.scratch((height - 1, depth * self.factor), "float32")
                self._few(full_block, tiles, first, count, panel)
            with T.Else():
                self._many(full_block, tiles, first, count, following)

    def _few(
        self, full_block: DepthBlock, tiles: Expr | int, first: Expr, count: Expr, panel: Buffer
    ) -> None:
        height = self.layout.target.tile_rows
        accumulators = self.vector.scratch((height - 1, self.layout.columns), "float32")

        def sums(i: Expr | int, column: int) -> Where:
            return accumulators, [i, column]

        with T.serial(0, count) as i:
            self._widen_row(first + i, full_block, panel, i)
        with T.serial(0, tiles) as t:
            tile = T.bind(full_block.tile + t)
            ahead = self._weight_stream(full_block.group, tile)
            ask = None if ahead is None else self._prefetcher(ahead)

            def multiply(acc: Registers) -> None:
                def products(step: Expr, elements: Elements) -> None:
                    for h, weights in enumerate(elements):
                        for i, row_acc in enumerate(acc):
                            a = panel[i, step * self.factor + h]
                            self._accumulate(row_acc, self.vector.splat(a), weights, self._fma)

                self._each_step(replace(full_block, tile=tile), ask, products)

            for m in range(1, height):
                with T.If(count == m), T.Then():
                    self._summed(
                        multiply, first, m, full_block.group, tile, Partial(sums, None, None)
                    )
            self._finish_kept(sums, first, count, full_block.group, tile)

    def _many(
        self,
        full_block: DepthBlock,
        tiles: Expr | int,
        first: Expr,
        count: Expr,
        following: tuple[Expr, Expr],
    ) -> None:
        lay, v = self.layout, self.vector
        at_once = tiles if isinstance(tiles, int) else max(self.tiles_at_once, self.dense_tiles)
        blocks = ceil_of(lay.depth, self.steps)
        weights = v.scratch((self.steps * self.factor, lay.columns), "float32")
        panel = v.scratch((PARTIAL_ROWS, self.steps * self.factor), "float32")
        accumulators = v.scratch((at_once, PARTIAL_ROWS, lay.columns), "float32")
        chunks = T.bind(ceildiv(count, PARTIAL_ROWS))
        with T.serial(0, chunks) as c, T.serial(0, T.int64(blocks)) as b:
            base = T.bind(first + c * PARTIAL_ROWS)
            n = T.bind(T.min(first + count - base, T.int64(PARTIAL_ROWS)))
            start = T.bind(b * self.steps)
            stop = stop_of(start, self.steps, lay.depth)
            done = T.bind(b == blocks - 1)
            after = T.bind(T.Select(done, T.int64(0), stop))
            # The block that is converted after this block of all tiles.
            leaves = T.bind(T.And(done, c == chunks - 1))
            group = T.bind(T.Select(leaves, following[0], full_block.group))
            coming = DepthBlock(
                group, T.Select(leaves, following[1], full_block.tile), after, after
            )
            block = replace(full_block, start=start, stop=stop)
            with T.serial(0, n) as i:
                self._widen_row(base + i, block, panel, i)
            with T.serial(0, tiles) as t:
                tile = T.bind(full_block.tile + t)
                last = T.bind(t == tiles - 1)
                then = DepthBlock(
                    T.bind(T.Select(last, coming.group, full_block.group)),
                    T.bind(T.Select(last, coming.tile, tile + 1)),
                    T.bind(T.Select(last, coming.start, start)),
                    stop,
                )

                def sums(i: Expr | int, column: int) -> Where:
                    return accumulators, [t, i, column]

                tile_block = replace(block, tile=tile)
                self._widen_weights(tile_block, weights)
                self._all_rows(tile_block, n, weights, panel, sums, b > 0, then)
                with T.If(done), T.Then():
                    self._finish_kept(sums, base, n, full_block.group, tile)

    def _all_rows(
        self,
        block: DepthBlock,
        count: Expr,
        weights: Buffer,
        panel: Buffer,
        sums: Callable[[Expr | int, int], Where],
        begun: Expr,
        then: DepthBlock,
    ) -> None:
        """Multiplies the block of `count` rows in `panel` with that of a tile in `weights`."""
        height = self.layout.target.tile_rows
        steps = T.bind(block.stop - block.start)
        following = Following(then.group, then.tile, then.start, 0, steps)

        def row_block(at: Expr, m: int) -> None:
            ask = self._prefetcher(following.share(at, m, count, self.layout.columns))

            def multiply(acc: Registers) -> None:
                self._panels(acc, weights, panel, at, block, ask)

            partial = Partial(lambda i, column: sums(at + i, column), begun, None)
            self._summed(multiply, at, m, block.group, block.tile, partial)

        each_row_block(count, height, row_block)

    def _panels(
        self,
        acc: Registers,
        weights: Buffer,
        panel: Buffer,
        at: Expr,
        block: DepthBlock,
        fetch: Fetch,
    ) -> None:
        """Adds the products of rows with tile `t`, both as float32.

        The prefetch comes before the last half, as a barrier: LLVM moves no load across it, and
        would otherwise load more weights at once than there are registers for.
        """
        v = self.vector
        with T.serial(0, block.stop - block.start) as step:
            for h in range(self.factor):
                if h == self.factor - 1:
                    fetch(step)
                k = step * self.factor + h
                b = [v.load(weights, [k, j * v.lanes]) for j in range(self.layout.vectors)]
                for i, sums in enumerate(acc):
                    self._accumulate(sums, v.splat(panel[at + i, k]), b, self._fma)

    def _each_step(
        self, block: DepthBlock, ask: Fetch | None, action: Callable[[Expr, Elements], None]
    ) -> None:
        """Calls `action` with each step, counted from the block's first, and its weights as
        float32; `ask` prefetches."""
        with T.serial(0, wide(block.stop - block.start)) as step:
            if ask is not None:
                ask(step)
            action(step, self._halves(block.group, block.tile, block.start + step))

    def _halves(self, group: Expr, tile: Expr, step: Expr) -> Elements:
        """The weights of each element of a step, as float32."""
        v, lay, w = self.vector, self.layout, self.operands.w
        starts = [j * v.lanes for j in range(lay.vectors)]
        if not lay.pairs:
            return [[v.load(w, [group, tile, step, start]) for start in starts]]
        pairs = [T.bind(w[group, tile, step, T.ramp(start, 1, v.lanes)]) for start in starts]
        return [[take(pair) for pair in pairs] for take in (v.low, v.high)]

    def _widen_weights(self, block: DepthBlock, weights: Buffer) -> None:
        """weights[t, k, :] = the weights of each tile, from the block's first element of K on."""
        v = self.vector

        def store(step: Expr, elements: Elements) -> None:
            for h, element in enumerate(elements):
                for j, vector in enumerate(element):
                    v.store(weights, [step * self.factor + h, j * v.lanes], vector)

        self._each_step(block, None, store)

    def _widen_row(self, row: Expr, block: DepthBlock, panel: Buffer, i: Expr | int) -> None:
        """panel[i, :] = the block of a row as float32, padded with 0 to whole steps."""
        v, lay, ops = self.vector, self.layout, self.operands
        begin = block.start * self.factor
        count = (block.stop - block.start) * self.factor
        if lay.spec.k % self.factor:
            count = T.min(count, lay.spec.k - begin)
        count = T.bind(count)
        full_vectors = T.bind(T.truncdiv(count, T.int64(v.lanes)))
        r = T.bind(ops.x_row(row))
        with T.serial(0, full_vectors) as c:
            at = c * v.lanes
            v.store(panel, [i, at], v.load(ops.x, [r, begin + at]))
        if lay.spec.k % v.lanes:
            rest = T.bind(T.cast(count - full_vectors * v.lanes, "int32"))
            with T.If(rest > 0), T.Then():
                at = full_vectors * v.lanes
                tail = v.load_tail(ops.x, [r, begin + at], rest)
                v.store_tail(panel, [i, at], tail, rest)
        if lay.spec.k % self.factor:
            with T.If(begin + count == lay.spec.k), T.Then():
                missing = -lay.spec.k % self.factor
                v.store_tail(panel, [i, count], v.splat(0.0), T.int32(missing))
