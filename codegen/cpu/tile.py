"""The register tile: a few rows of x times one tile of packed weights, summed in registers.

    acc[i][j] += x[row + i, k] * w[k, lanes of j]      for i < 6, j < 4 (2 with few registers)

All matrix kernels are loops around this. Each element of y is summed over K in one order, by
one thread, whatever the number of rows and threads: results do not depend on either.

Three ways to read x, by what the target can do:
    pairs       bf16 with dot products: two elements of x are broadcast as one int32
    direct      float32: one element is broadcast
    widened     float16, and bf16 without dot products: the rows are first converted to a
                float32 panel, once a tile, so that the inner loop only broadcasts and adds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.layout import Layout
from moec.codegen.cpu.tasks import bytes_of
from moec.codegen.cpu.vector import Vector

# Rows that a thread takes at once, where there is a choice. A multiple of every tile's rows.
ROW_CHUNK = 96
# Rows that pass over a block of K before the next block: their partial sums stay in the cache, and
# few experts have more, for which all weights are read again. A multiple of every tile's rows.
PARTIAL_ROWS = 192

Fetch = Callable[[Expr], None]  # emits what a step of K asks the memory for
Following = tuple[Expr, Expr, Expr | int]
"""The weights that are read next: their group and tile, and how many steps of K behind (or before)
those that are being read."""
LINE = 64  # bytes that the memory gives at once

Epilogue = Callable[..., Expr]  # (sum) or (gate, up) -> value; float32 vectors


@dataclass(frozen=True)
class Operands:
    """The buffers of a matrix kernel, and how a row of y finds its row of x."""

    x: Buffer  # [rows of x, k]
    w: Buffer  # packed
    y: Buffer  # [rows of y, n]
    bias: Buffer | None
    x_row: Callable[[Expr], Expr]
    scale: Callable[[Expr], Expr] | None  # row of y -> float32 that multiplies its row of x
    gathered: bool  # neighbours in y lie anywhere in x


@dataclass(frozen=True)
class Tile:
    """Emits the loops over rows and K for one tile of columns."""

    layout: Layout
    operands: Operands
    epilogue: Epilogue | None

    @property
    def vector(self) -> Vector:
        return Vector(self.layout.target)

    @property
    def widened(self) -> bool:
        spec = self.layout.spec
        return spec.dtype != "float32" and not self.dots

    @property
    def dots(self) -> bool:
        return self.layout.pairs and self.layout.target.bf16_dot

    @property
    def row_chunk(self) -> int:
        """Rows of a dense product that a thread takes at once."""
        return ROW_CHUNK

    @property
    def tiles_at_once(self) -> int:
        """Tiles of columns of an expert that a thread takes at once, where enough is left to share
        out: they lie side by side, so few rows fetch the next one at the end of each."""
        lay = self.layout
        most = min(lay.tuning.tiles_at_once, lay.tiles)
        return most if lay.tiles * lay.spec.groups >= 256 else 1

    def rows(
        self,
        group: Expr,
        tile: Expr,
        first: Expr,
        count: Expr,
        following: tuple[Expr, Expr] | None = None,
        tiles: Expr | int = 1,
    ) -> None:
        """Makes y[first : first + count, columns of tile and, where there are `tiles`, of those
        behind it]; first and count are int64.

        `following` are group and tile of the weights that this thread reads next: while there
        are rows enough to hide it, they are fetched into the cache meanwhile.
        """
        with T.serial(0, tiles) as t:
            one = T.bind(tile + t)
            after = None
            if following is not None:
                last = T.bind(t == tiles - 1)
                after = (
                    T.bind(T.Select(last, following[0], group)),
                    T.bind(T.Select(last, following[1], one + 1)),
                )
            self._rows_of(group, one, first, count, after)

    def _rows_of(
        self, group: Expr, tile: Expr, first: Expr, count: Expr, following: tuple[Expr, Expr] | None
    ) -> None:
        """As `rows`, of one tile."""
        lay = self.layout
        blocks = -(-lay.depth // lay.depth_block)
        panel = None
        if self.widened:
            elements = lay.depth_block * (2 if lay.pairs else 1)
            panel = T.alloc_buffer((lay.target.tile_rows, elements), "float32")
        if blocks == 1:
            after = None if following is None else (*following, 0)
            self._row_blocks(group, tile, first, count, 0, None, first, panel, after)
            return
        partial = T.alloc_buffer((PARTIAL_ROWS, lay.columns), "float32")
        chunks = T.bind(ceildiv(count, PARTIAL_ROWS))
        with T.serial(0, chunks) as c:
            base = T.bind(first + c * PARTIAL_ROWS)
            n = T.bind(T.min(count - c * PARTIAL_ROWS, T.int64(PARTIAL_ROWS)))
            with T.serial(0, blocks) as b:
                after = None
                if following is not None:
                    inside = T.bind(T.Or(b < blocks - 1, c < chunks - 1))
                    after = (
                        T.bind(T.Select(inside, group, following[0])),
                        T.bind(T.Select(inside, tile, following[1])),
                        T.bind(T.Select(b < blocks - 1, lay.depth_block, -b * lay.depth_block)),
                    )
                self._row_blocks(group, tile, base, n, b, partial, base, panel, after)

    def zero_rows(self, tile: Expr, first: Expr, count: Expr) -> None:
        """Sets y[first : first + count, columns of tile] to 0."""
        v = self.vector
        with T.serial(0, count) as r:
            for j in range(self.layout.width // v.lanes):
                self._store(first + r, tile, j, v.splat(0.0))

    def _row_blocks(
        self,
        group: Expr,
        tile: Expr,
        first: Expr,
        count: Expr,
        block: Expr | int,
        partial: Buffer | None,
        base: Expr,
        panel: Buffer | None,
        following: Following | None = None,
    ) -> None:
        def some(row: Expr, m: int, fetch: Fetch | None) -> None:
            self._block(group, tile, row, m, block, partial, base, panel, fetch)

        self._in_blocks(group, tile, first, count, self.layout.target.tile_rows, following, some)

    def _in_blocks(
        self,
        group: Expr,
        tile: Expr,
        first: Expr,
        count: Expr,
        most: int,
        following: Following | None,
        some: Callable[[Expr, int, Fetch | None], None],
    ) -> None:
        """`some` for all rows, `most` of them at a time, and then for those that are left."""
        v, vectors, w = self.vector, self.layout.vectors, self.operands.w
        whole = T.bind(T.truncdiv(count, T.int64(most)))
        fetching: Expr = T.int64(0)
        if following is not None:
            # Each of these blocks of rows fetches one vector of every step of the next weights.
            enough = whole >= max(vectors, self.layout.tuning.next_from)
            fetching = T.bind(T.Select(enough, T.int64(vectors), T.int64(0)))
            with T.serial(0, fetching) as i:
                next_group, next_tile, steps, lane = (*following, i * v.lanes)
                row = T.bind(first + i * most)
                some(row, most, lambda k: v.prefetch(w, [next_group, next_tile, k + steps, lane]))

        def own(step: Expr) -> None:
            self._fetch(group, tile, step)

        with T.If(T.And(fetching == 0, whole > 0)), T.Then():
            some(first, most, own)
        start = T.bind(T.max(fetching, T.int64(1)))
        with T.serial(start, T.max(start, whole)) as i:
            some(T.bind(first + i * most), most, None)
        left = T.bind(T.truncmod(count, T.int64(most)))
        for m in range(1, most):
            with T.If(left == m), T.Then():
                some(T.bind(first + count - m), m, own)

    def _block(
        self,
        group: Expr,
        tile: Expr,
        row: Expr,
        m: int,
        block: Expr | int,
        partial: Buffer | None,
        base: Expr,
        panel: Buffer | None,
        fetch: Fetch | None,
    ) -> None:
        """`m` rows from `row` on, over one block of K."""
        v, lay = self.vector, self.layout
        lanes = T.ramp(0, 1, v.lanes)
        x_rows = [T.bind(self.operands.x_row(row + i)) for i in range(m)]
        # A buffer of one vector is a register; a larger one would be memory.
        acc = [
            [T.alloc_buffer((v.lanes,), "float32") for _ in range(lay.vectors)] for _ in range(m)
        ]

        def each(action: Callable[[int, int], Expr]) -> None:
            for i in range(m):
                for j in range(lay.vectors):
                    T.buffer_store(acc[i][j], action(i, j), [lanes])

        def saved(i: int, j: int) -> tuple[Expr, Expr]:
            return (row - base + i, T.ramp(j * v.lanes, 1, v.lanes))

        if partial is None:
            each(lambda i, j: v.splat(0.0))
        else:
            with T.If(block == 0):
                with T.Then():
                    each(lambda i, j: v.splat(0.0))
                with T.Else():
                    each(lambda i, j: partial[saved(i, j)])

        start = block * lay.depth_block
        stop = T.min(start + lay.depth_block, lay.depth) if partial is not None else lay.depth
        if panel is not None:
            self._widen(x_rows, start, panel)
        self._depth_loop(acc, x_rows, group, tile, start, stop, panel, fetch)

        if partial is None:
            self._finish(acc, row, m, group, tile)
            return
        with T.If(stop == lay.depth):
            with T.Then():
                self._finish(acc, row, m, group, tile)
            with T.Else():
                for i in range(m):
                    for j in range(lay.vectors):
                        T.buffer_store(partial, acc[i][j][lanes], list(saved(i, j)))

    def _depth_loop(
        self,
        acc: list[list[Buffer]],
        x_rows: list[Expr],
        group: Expr,
        tile: Expr,
        start: Expr | int,
        stop: Expr | int,
        panel: Buffer | None,
        fetch: Fetch | None,
    ) -> None:
        v, lay, x, w = self.vector, self.layout, self.operands.x, self.operands.w
        lanes = T.ramp(0, 1, v.lanes)

        def add(i: int, a: Expr, b: list[Expr], op: Callable[[Expr, Expr, Expr], Expr]) -> None:
            for j in range(lay.vectors):
                T.buffer_store(acc[i][j], op(acc[i][j][lanes], a, b[j]), [lanes])

        def fma(c: Expr, a: Expr, b: Expr) -> Expr:
            return v.fma(a, b, c)

        def weights(k: Expr | int) -> list[Expr]:
            at = [T.ramp(j * v.lanes, 1, v.lanes) for j in range(lay.vectors)]
            if lay.dtype == "float16":
                return [v.load(w, [group, tile, k, j * v.lanes]) for j in range(lay.vectors)]
            return [T.bind(w[group, tile, k, lane]) for lane in at]

        odd = self.dots and lay.spec.k % 2 == 1
        whole = T.min(stop, lay.depth - 1) if odd else stop
        with T.serial(0, whole - start) as step:
            k = start + step
            if fetch is not None:
                fetch(k)
            b = weights(k)
            if self.dots:
                for i, r in enumerate(x_rows):
                    add(i, v.splat(v.pair(x, [r, k * 2])), b, v.dot2)
            elif panel is None:
                for i, r in enumerate(x_rows):
                    add(i, v.splat(v.scalar(x, [r, k])), b, fma)
            else:
                halves = (v.low, v.high) if lay.pairs else (v.bind,)
                for h, take in enumerate(halves):
                    half = [take(c) for c in b]
                    for i in range(len(x_rows)):
                        add(i, v.splat(panel[i, step * len(halves) + h]), half, fma)
        if odd:
            with T.If(stop == lay.depth), T.Then():
                b = weights(lay.depth - 1)
                for i, r in enumerate(x_rows):
                    add(i, v.splat(v.last(x, [r, lay.spec.k - 1])), b, v.dot2)

    def _fetch(self, group: Expr, tile: Expr, step: Expr) -> None:
        """Asks for what the stream of weights holds `fetched` bytes behind a step: while sums are
        made, too few loads are under way to keep the memory busy."""
        v, lay, w = self.vector, self.layout, self.operands.w
        one = lay.columns * bytes_of(w)
        steps = lay.tuning.fetched // one
        if not steps:
            return
        for start in range(0, one, LINE):
            v.prefetch(w, [group, tile, step + steps, start // bytes_of(w)])

    def _widen(self, x_rows: list[Expr], start: Expr | int, panel: Buffer) -> None:
        """panel[i, :] = the block of row i as float32, and 0 behind an odd end."""
        v, lay, x = self.vector, self.layout, self.operands.x
        factor = 2 if lay.pairs else 1
        begin = start * factor
        count = T.bind(T.min(lay.spec.k - begin, lay.depth_block * factor))
        whole = T.truncdiv(count, v.lanes)
        for i, r in enumerate(x_rows):
            with T.serial(0, whole) as c:
                at = c * v.lanes
                v.store(panel, [i, at], v.load(x, [r, begin + at]))
            with T.serial(0, count - whole * v.lanes) as c:
                at = whole * v.lanes + c
                T.buffer_store(panel, v.scalar(x, [r, begin + at]), [i, at])
            if lay.spec.k % factor:
                with T.If(begin + count == lay.spec.k), T.Then():
                    T.buffer_store(panel, T.float32(0), [i, count])

    def _finish(self, acc: list[list[Buffer]], row: Expr, m: int, group: Expr, tile: Expr) -> None:
        lanes = T.ramp(0, 1, self.vector.lanes)
        for i in range(m):
            self._finish_row([a[lanes] for a in acc[i]], T.bind(row + i), group, tile)

    def _finish_row(self, sums: list[Expr], row: Expr, group: Expr, tile: Expr) -> None:
        """Scale, bias, epilogue, rounding, store of one row's vectors of sums."""
        v, lay, ops = self.vector, self.layout, self.operands
        outputs = lay.width // v.lanes
        scale = None if ops.scale is None else v.splat(T.bind(ops.scale(row)))

        def total(j: int) -> Expr:
            value = sums[j]
            if scale is not None:
                value = value * scale
            if ops.bias is not None:
                value = value + ops.bias[group, tile, T.ramp(j * v.lanes, 1, v.lanes)]
            return T.bind(value)

        for j in range(outputs):
            parts = [total(j), total(outputs + j)] if lay.spec.gated else [total(j)]
            value = self.epilogue(*parts) if self.epilogue is not None else parts[0]
            self._store(row, tile, j, value)

    def _store(self, row: Expr, tile: Expr, j: int, value: Expr) -> None:
        """Stores vector j of the tile's columns, or what of it exists."""
        v, lay, y = self.vector, self.layout, self.operands.y
        n = lay.spec.n
        column = tile * lay.width + j * v.lanes
        if n % lay.width == 0:
            v.store(y, [row, column], value)
            return
        value = T.bind(value)
        with T.If(column + v.lanes <= n), T.Then():
            v.store(y, [row, column], value)
        if n % v.lanes and j == n % lay.width // v.lanes:
            with T.If(tile == lay.tiles - 1), T.Then():
                v.store_tail(y, [row, column], value, n % v.lanes)


def ceildiv(a: Expr, b: int) -> Expr:
    return T.truncdiv(a + (b - 1), T.int64(b))
