"""The register tile: a few rows of x times one tile of packed weights, summed in registers.

    acc[i][j] += x[row + i, k] * w[k, lanes of j]      for i < 6, j < 4 (2 with few registers)

All matrix kernels are loops around this. Each element of y is summed over K in one order, by one
thread, so that results do not depend on the number of rows or threads.

Two ways to read x, depending on the target:
    pairs       bf16 with dot products: two elements of x are broadcast as one int32
    direct      float32: one element is broadcast

float16, and bf16 without dot products, are converted to float32 first (upconvert_tile.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.prefetch import Following, Stream, select_stream
from moec.codegen.cpu.gemm.row_blocks import ceil_of, ceildiv, each_row_block, stop_of
from moec.codegen.cpu.parallel import bytes_of
from moec.codegen.cpu.vector import Vector

# Rows that a thread takes at once, where there is a choice. A multiple of every tile's rows.
ROW_CHUNK = 96
# The most tiles of columns of an expert that a thread computes at once.
TILES_AT_ONCE = 4
# Bytes by which few rows prefetch their weights ahead.
FETCHED = 16384
# Rows that are multiplied with a block of K before the next block: their partial sums stay in the
# cache. The few experts with more rows read all weights again. A multiple of every tile's rows.
PARTIAL_ROWS = 192

Fetch = Callable[[Expr], None]  # emits the prefetches of a step of K
LINE = 64  # bytes of a cache line

Epilogue = Callable[..., Expr]  # (sum) or (gate, up) -> value; float32 vectors
Where = tuple[Buffer, list[Expr | int]]  # a buffer, and the index of an element
Registers = list[list[Buffer]]  # one vector of float32 sums for each row and vector of a tile


@dataclass(frozen=True)
class Partial:
    """Partial sums in memory: `at(i, c)` is the position of row i's sums from column c on.

    `begun`: start from the partial sums, else from 0. `done`: store the final result, else the
    partial sums. None means never.
    """

    at: Callable[[int, int], Where]
    begun: Expr | None
    done: Expr | None


@dataclass(frozen=True)
class Operands:
    """The buffers of a matrix kernel, and the map from a row of y to its row of x."""

    x: Buffer  # [rows of x, k]
    w: Buffer  # packed
    y: Buffer  # [rows of y, n]
    bias: Buffer | None
    x_row: Callable[[Expr], Expr]
    scale: Callable[[Expr], Expr] | None  # row of y -> float32 that multiplies its row of x
    gathered: bool  # consecutive rows of y may be anywhere in x


class RowRun(NamedTuple):
    """y[first : first + count, columns of `tiles` tiles from `tile` on], int64, by the weights of
    one group. `following` are group and tile of the weights that this thread reads next."""

    group: Expr
    tile: Expr
    first: Expr
    count: Expr
    following: tuple[Expr, Expr]
    tiles: Expr | int = 1


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
    def dots(self) -> bool:
        return self.layout.pairs and self.layout.target.bf16_dot

    @property
    def factor(self) -> int:
        """Elements of K that a step takes."""
        return 2 if self.dots else 1

    @property
    def _lanes(self) -> list[Expr]:
        """The columns of each vector of a tile."""
        lanes = self.vector.lanes
        return [T.ramp(j * lanes, 1, lanes) for j in range(self.layout.vectors)]

    @property
    def row_chunk(self) -> int:
        """Rows of a dense product that a thread takes at once."""
        return ROW_CHUNK

    @property
    def dense_tiles(self) -> int:
        """Tiles of columns of a dense product that a thread computes at once for many rows."""
        return 1

    @property
    def tiles_at_once(self) -> int:
        """Tiles of columns of an expert that a thread computes at once, if enough remain for all
        threads. They are contiguous, so that few rows can prefetch the next one."""
        lay = self.layout
        most = min(TILES_AT_ONCE, lay.tiles)
        return most if lay.tiles * lay.spec.groups >= 256 else 1

    def expert_at(self, number: Expr) -> Expr:
        """The expert whose weights are read as that number of all."""
        return number

    def rows(self, run: RowRun) -> None:
        """Computes the run; if it has more rows than a block, the weights that follow are
        prefetched meanwhile."""
        group, tile, first, count, following, tiles = run
        with T.serial(0, tiles) as t:
            one = T.bind(tile + t)
            last = T.bind(t == tiles - 1)
            after = (
                T.bind(T.Select(last, following[0], group)),
                T.bind(T.Select(last, following[1], one + 1)),
            )
            self._rows_of(RowRun(group, one, first, count, after))

    def _rows_of(self, run: RowRun) -> None:
        """As `rows`, for one tile."""
        group, tile, first, count, following, _ = run
        lay = self.layout
        blocks = ceil_of(lay.depth, lay.depth_block)
        if blocks == 1:
            after = Following(*following, 0, 0, lay.depth)
            ready = self._ready(group, tile, 0, lay.depth)

            def full_depth(row: Expr, m: int, fetch: Fetch | None) -> None:
                ready._block(group, tile, row, m, 0, lay.depth, None, fetch)

            self._in_blocks(group, tile, first, count, lay.target.tile_rows, after, full_depth)
            return
        partial = self.vector.scratch((PARTIAL_ROWS, lay.columns), "float32")
        chunks = T.bind(ceildiv(count, PARTIAL_ROWS))
        with T.serial(0, chunks) as c:
            base = T.bind(first + c * PARTIAL_ROWS)
            n = T.bind(T.min(count - c * PARTIAL_ROWS, T.int64(PARTIAL_ROWS)))
            with T.serial(0, T.int64(blocks)) as b:
                start = T.bind(b * lay.depth_block)
                stop = stop_of(start, lay.depth_block, lay.depth)
                ready = self._ready(group, tile, start, stop)
                inside = T.bind(T.Or(b < blocks - 1, c < chunks - 1))
                after = Following(
                    T.bind(T.Select(inside, group, following[0])),
                    T.bind(T.Select(inside, tile, following[1])),
                    T.bind(T.Select(b < blocks - 1, stop, T.int64(0))),
                    start,
                    stop,
                )

                def part(row: Expr, m: int, fetch: Fetch | None) -> None:
                    sums = Partial(
                        lambda i, column: (partial, [row - base + i, column]),
                        b > 0,
                        b == blocks - 1,
                    )
                    ready._block(group, tile, row, m, start, stop, sums, fetch)

                self._in_blocks(group, tile, base, n, lay.target.tile_rows, after, part)

    def _ready(self, group: Expr, tile: Expr, start: Expr | int, stop: Expr | int) -> Tile:
        """The tile for a block of K, after what precedes the products of all its rows."""
        return self

    def zero_rows(self, tile: Expr, first: Expr, count: Expr) -> None:
        """Sets y[first : first + count, columns of tile] to 0."""
        v = self.vector
        with T.serial(0, count) as r:
            for j in range(self.layout.width // v.lanes):
                self._store(first + r, tile, j, v.splat(0.0))

    def _in_blocks(
        self,
        group: Expr,
        tile: Expr,
        first: Expr,
        count: Expr,
        most: int,
        following: Following,
        body: Callable[[Expr, int, Fetch | None], None],
    ) -> None:
        """Calls `body` for all rows, `most` at a time, and then for the remaining ones.

        The blocks divide the prefetching of the weights of `following` among them. A single block
        waits for its own weights, so it prefetches these a little ahead of their use instead.
        """
        own_stream, few = self._weight_stream(group, tile), T.bind(count <= most)

        def prefetch_block(before: Expr | int, rows: Expr | int) -> Fetch:
            share = following.share(before, rows, count, self.layout.columns)
            return self._prefetcher(
                share if own_stream is None else select_stream(few, own_stream, share)
            )

        each_row_block(
            count, most, lambda row, m: body(T.bind(first + row), m, prefetch_block(row, m))
        )

    def _block(
        self,
        group: Expr,
        tile: Expr,
        row: Expr,
        m: int,
        start: Expr | int,
        stop: Expr | int,
        partial: Partial | None,
        fetch: Fetch | None,
    ) -> None:
        """Computes `m` rows from `row` on, over the steps `start` .. `stop` of K."""
        x_rows = [T.bind(self.operands.x_row(row + i)) for i in range(m)]

        def multiply(acc: Registers) -> None:
            self._depth_loop(acc, x_rows, group, tile, start, stop, fetch)

        self._summed(multiply, row, m, group, tile, partial)

    def _summed(
        self,
        multiply: Callable[[Registers], None],
        row: Expr,
        m: int,
        group: Expr,
        tile: Expr,
        partial: Partial | None,
    ) -> None:
        """Initialises sums in registers, emits `multiply`, which adds to them, and stores them."""
        v, lay = self.vector, self.layout
        lanes = T.ramp(0, 1, v.lanes)
        # A buffer of one vector is a register; a larger one would be memory.
        acc = [
            [T.alloc_buffer((v.lanes,), "float32") for _ in range(lay.vectors)] for _ in range(m)
        ]

        def each(action: Callable[[int, int], Expr]) -> None:
            for i in range(m):
                for j in range(lay.vectors):
                    T.buffer_store(acc[i][j], action(i, j), [lanes])

        def keep(partial: Partial) -> None:
            for i in range(m):
                for j in range(lay.vectors):
                    v.store(*partial.at(i, j * v.lanes), acc[i][j][lanes])

        each(lambda i, j: v.splat(0.0))
        if partial is not None and partial.begun is not None:
            begun = partial.at
            with T.If(partial.begun), T.Then():
                each(lambda i, j: v.load(*begun(i, j * v.lanes)))
        multiply(acc)
        if partial is None:
            self._finish(acc, row, m, group, tile)
        elif partial.done is None:
            keep(partial)
        else:
            with T.If(partial.done):
                with T.Then():
                    self._finish(acc, row, m, group, tile)
                with T.Else():
                    keep(partial)

    def _depth_loop(
        self,
        acc: Registers,
        x_rows: list[Expr],
        group: Expr,
        tile: Expr,
        start: Expr | int,
        stop: Expr | int,
        fetch: Fetch | None,
    ) -> None:
        v, x, size = self.vector, self.operands.x, self.factor
        full, depth = self.layout.spec.k // size, self.layout.depth

        def products(k: Expr | int, fetch: Fetch | None, elements: int) -> None:
            for i, weights in enumerate(self._weights(group, tile, k, fetch)):
                if (left := elements - 2 * i) <= 0:
                    return
                read = (v.pair if left > 1 else v.last) if self.dots else v.scalar
                for row, r in zip(acc, x_rows, strict=True):
                    a = v.splat(read(x, [r, k * size + 2 * i]))
                    self._accumulate(row, a, weights, v.dot2 if self.dots else self._fma)

        with T.serial(0, (stop if full == depth else T.min(stop, full)) - start) as step:
            products(start + step, fetch, size)
        if full < depth:
            with T.If(stop == depth), T.Then():
                products(full, None, self.layout.spec.k % size)

    def _weights(
        self, group: Expr, tile: Expr, k: Expr | int, fetch: Fetch | None
    ) -> Iterator[list[Expr]]:
        """The vectors of weights of a step, for one operand from x after the other."""
        if fetch is not None:
            fetch(k)
        yield [T.bind(self.operands.w[group, tile, k, lanes]) for lanes in self._lanes]

    def _fma(self, c: Expr, a: Expr, b: Expr) -> Expr:
        return self.vector.fma(a, b, c)

    def _accumulate(
        self, row: list[Buffer], a: Expr, b: list[Expr], op: Callable[[Expr, Expr, Expr], Expr]
    ) -> None:
        """row[j] = op(row[j], a, b[j])"""
        lanes = T.ramp(0, 1, self.vector.lanes)
        for sums, one in zip(row, b, strict=True):
            T.buffer_store(sums, op(sums[lanes], a, one), [lanes])

    def _weight_stream(self, group: Expr, tile: Expr) -> Stream | None:
        """The tile's own weights, FETCHED bytes ahead of a step: the loads of a product alone are
        too few to keep the memory busy."""
        columns = self.layout.columns
        steps = FETCHED // (columns * bytes_of(self.operands.w))
        return Stream(group, tile, steps, 0, columns) if steps else None

    def _prefetcher(self, stream: Stream) -> Fetch:
        """Prefetches a stream, which advances by at most one step of weights per step of K."""
        size = bytes_of(self.operands.w)

        def ask(k: Expr) -> None:
            *tile, first = stream.at(k)
            for start in range(0, self.layout.columns * size, LINE):
                self.vector.prefetch(self.operands.w, [*tile, first + start // size])

        return ask

    def _finish(self, acc: Registers, row: Expr, m: int, group: Expr, tile: Expr) -> None:
        lanes = T.ramp(0, 1, self.vector.lanes)
        for i in range(m):
            self._finish_row([a[lanes] for a in acc[i]], T.bind(row + i), group, tile)

    def _finish_kept(
        self,
        at: Callable[[Expr, int], Where],
        first: Expr,
        count: Expr | int,
        group: Expr,
        tile: Expr,
    ) -> None:
        """Finishes `count` rows from `first` on, whose sums are at `at(i, column)`."""
        v = self.vector
        with T.serial(0, count) as i:
            sums = [v.load(*at(i, j * v.lanes)) for j in range(self.layout.vectors)]
            self._finish_row(sums, T.bind(first + i), group, tile)

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
        """Stores vector j of the tile's columns, as far as these exist."""
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
