"""Register tiles of products with unpacked matrices, in PyTorch's layout.

Weights in training change at every step, so packing does not pay. Two forms read both operands
along their contiguous axis:

    Mixture     sums[i, k] = sum over s of a[i, s] * b[s, k]     linear combinations of b's rows
    Dots        sums[i, j] = sum over k of a[i, k] * b[j, k]     dot products of a's rows with b's

bf16 is multiplied in pairs where the target has dot products. In Dots, pairs are contiguous. A
mixture pairs two of b's rows: the low halves of the words of both rows make one vector (columns 0,
2, 4, ...) and the high halves another (1, 3, 5, ...), which are interleaved when sums are stored.
Otherwise elements are converted to float32 as they are loaded. Each sum is added in one order, for
any number of rows and threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.gemm.tile import LINE, Fetch, Partial, Where
from moec.codegen.cpu.parallel import bytes_of
from moec.codegen.cpu.vector import Vector
from moec.target.cpu import CpuTarget

DOTS = 4  # of b's rows that are multiplied with a's at once


@dataclass(frozen=True)
class Mixture:
    """Sums of up to `target.tile_rows` rows by some vectors of columns.

    `paired`: a step takes two of b's rows, and pairs of a's elements.
    """

    target: CpuTarget
    paired: bool

    @property
    def vector(self) -> Vector:
        return Vector(self.target)

    @property
    def columns(self) -> int:
        """Columns of a full tile."""
        return self.target.tile_vectors * self.target.vector_lanes

    @property
    def words(self) -> str:
        """The element type of a panel."""
        return "int32" if self.paired else "float32"

    def vectors(
        self, columns: int, step: Expr, b: Callable[[Expr, int], Where], alone: bool = False
    ) -> list[Expr]:
        """The vectors of b in a step: `columns` columns of one row, or of a pair of rows (`alone`:
        of which one exists). `b(s, c)` is column c of the tile in b's row s."""
        v = self.vector
        parts = _vectors(columns, v.lanes)
        if not self.paired:
            tail = T.int32(parts[-1])
            return [
                v.load(*b(step, j * v.lanes))
                if count == v.lanes
                else v.load_tail(*b(step, j * v.lanes), tail)
                for j, count in enumerate(parts)
            ]
        words: list[Expr] = []
        for j in range(0, len(parts), 2):
            first = v.words(*b(step * 2, j * v.lanes))
            second = T.broadcast(T.int32(0), v.lanes)
            if not alone:
                second = v.words(*b(step * 2 + 1, j * v.lanes))
            words += v.interleaved(first, second)
        return words

    def gather(
        self,
        panel: Buffer,
        columns: int,
        steps: Expr,
        b: Callable[[Expr, int], Where],
        odd: Expr | None,
    ) -> None:
        """panel[step] = the vectors of each step, for many rows of a: b's rows are so far apart in
        memory that they evict each other from the cache. `odd`: the last pair has one row."""

        def put(step: Expr, alone: bool) -> None:
            for j, vector in enumerate(self.vectors(columns, step, b, alone)):
                lanes = T.ramp(j * self.vector.lanes, 1, self.vector.lanes)
                T.buffer_store(panel, vector, [step, lanes])

        with T.serial(0, steps) as step:
            put(step, False)
        if odd is not None:
            with T.If(odd), T.Then():
                put(steps, True)

    def gathered(self, panel: Buffer, columns: int, step: Expr) -> list[Expr]:
        """The vectors of a step of a panel."""
        lanes = self.vector.lanes
        count = len(_vectors(columns, lanes))
        return [T.bind(panel[step, T.ramp(j * lanes, 1, lanes)]) for j in range(count)]

    def emit(
        self,
        m: int,
        columns: int,
        steps: Expr,
        a: Callable[[int, Expr], Expr],
        b: Callable[[Expr], list[Expr]],
        store: Callable[[int, int, int, list[Expr]], None],
        partial: Partial,
    ) -> None:
        """`m` rows by `columns` columns (a full tile's, or fewer at the end of rows).

        `a(i, step)` is an element as float32, or a pair as int32; `b(step)` are the vectors of a
        step. `store(i, c, count, sums)` stores `count` columns from c on: one vector, or two, of
        even and of odd columns.
        """
        v = self.vector
        lanes, all_lanes = v.lanes, T.ramp(0, 1, v.lanes)
        parts = _vectors(columns, lanes)
        acc = [[T.alloc_buffer((lanes,), "float32") for _ in parts] for _ in range(m)]

        def each(value: Callable[[int, int], Expr]) -> None:
            for i in range(m):
                for j in range(len(parts)):
                    T.buffer_store(acc[i][j], value(i, j), [all_lanes])

        with T.If(partial.begun):
            with T.Then():
                each(lambda i, j: v.load(*partial.at(i, j * lanes)))
            with T.Else():
                each(lambda i, j: v.splat(0.0))
        with T.serial(0, steps) as step:
            vectors = b(step)
            for i, row in enumerate(acc):
                factor = v.splat(a(i, step))
                for sums, one in zip(row, vectors, strict=True):
                    old = sums[all_lanes]
                    new = v.dot2(old, factor, one) if self.paired else v.fma(factor, one, old)
                    T.buffer_store(sums, new, [all_lanes])

        def finish() -> None:
            each_time = 2 if self.paired else 1
            for i, row in enumerate(acc):
                for j in range(0, len(parts), each_time):
                    sums = [one[all_lanes] for one in row[j : j + each_time]]
                    store(i, j * lanes, sum(parts[j : j + each_time]), sums)

        with T.If(partial.done):
            with T.Then():
                finish()
            with T.Else():
                for i, row in enumerate(acc):
                    for j, sums in enumerate(row):
                        v.store(*partial.at(i, j * lanes), sums[all_lanes])


@dataclass(frozen=True)
class Dots:
    """Sums of up to `target.tile_rows` of a's rows with four of b's, `width` elements each."""

    target: CpuTarget
    width: int
    paired: bool

    @property
    def vector(self) -> Vector:
        return Vector(self.target)

    def emit(
        self,
        m: int,
        a: Callable[[int], Where],
        b: Callable[[int], Where],
        sums: Callable[[int], Where],
        fetching: Expr,
        fetch: Fetch,
    ) -> None:
        """`m` of a's rows. `a(i)` and `b(j)` are rows, as indices without the last; `sums(i)` is
        the destination of the four float32 sums of a's row i. If `fetching`, `fetch` emits the
        prefetches of each step."""
        v, many = self.vector, DOTS
        lanes = T.ramp(0, 1, v.lanes)
        acc = [[T.alloc_buffer((v.lanes,), "float32") for _ in range(many)] for _ in range(m)]
        for row in acc:
            for one in row:
                T.buffer_store(one, v.splat(0.0), [lanes])
        each = 2 * v.lanes if self.paired else v.lanes

        def add(k: Expr | int, count: int) -> None:
            def load(buffer: Buffer, start: list[Expr]) -> Expr:
                where = [*start, k]
                if self.paired:
                    return v.words(buffer, where)
                return (
                    v.load(buffer, where)
                    if count == v.lanes
                    else v.load_tail(buffer, where, T.int32(count))
                )

            ones = [load(*b(j)) for j in range(many)]
            for i in range(m):
                row = load(*a(i))
                for j in range(many):
                    old = acc[i][j][lanes]
                    new = v.dot2(old, row, ones[j]) if self.paired else v.fma(row, ones[j], old)
                    T.buffer_store(acc[i][j], new, [lanes])

        with T.serial(0, self.width // each) as s:
            with T.If(fetching), T.Then():
                fetch(s)
            add(s * each, v.lanes)
        if rest := self.width % each:
            add(self.width - rest, rest)
        for i in range(m):
            v.store_sums(*sums(i), [one[lanes] for one in acc[i]])


def _vectors(columns: int, lanes: int) -> list[int]:
    """The number of columns of each vector."""
    return [min(lanes, columns - start) for start in range(0, columns, lanes)]


def in_blocks(count: Expr, most: int, body: Callable[[list[Expr]], None]) -> None:
    """Calls `body` with the indices of `most` of `count` items at a time, then of the remaining
    ones in pairs; an odd last index appears twice."""
    blocks = T.bind(T.truncdiv(count, T.int64(most)))
    with T.serial(0, blocks) as block:
        body([T.bind(block * most + i) for i in range(most)])
    left = T.bind(count - blocks * most)
    with T.serial(0, T.truncdiv(left + 1, T.int64(2))) as block:
        first = T.bind(blocks * most + block * 2)
        body([first, T.bind(T.min(first + 1, count - 1))])


def lines(v: Vector, buffer: Buffer, index: list[Expr | int], columns: int) -> None:
    """Prefetches the cache lines of `columns` elements."""
    *first, start = index
    for at in range(0, columns * bytes_of(buffer), LINE):
        v.prefetch(buffer, [*first, start + at // bytes_of(buffer)])
