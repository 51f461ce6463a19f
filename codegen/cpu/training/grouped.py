"""Products of sorted rows with unpacked matrices w[E, N, K], and their gradients.

    product    y[r]  = x[r] @ w[e]^T (+ b[e])              R x N
    mixed      dx[r] = dy[r] @ w[e] (+ b[e])               R x K
    outer      dw[e] = sum of dy[r]^T @ x[r], 0 of none    E x N x K

for ends[e-1] <= r < ends[e]; rows without an expert become 0. Nothing is packed, so weights may
change between calls. For a transposed stack, [E, K, N], product and mixed swap roles, and so do the
factors of outer. Sums are in float32 and rounded once, when they are stored. The threads share
equal pieces of all experts' matrices, with pieces as the outer loop, as in gemm/sorted_rows.py.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.gemm.row_blocks import ceildiv
from moec.codegen.cpu.gemm.tile import ROW_CHUNK, Partial
from moec.codegen.cpu.training.loops import (
    TILES,
    MatrixStack,
    chunks,
    columns_of,
    each_piece,
    existing,
    pieces,
    plus,
    put,
    zero,
    zero_unowned_rows,
)
from moec.codegen.cpu.training.tile import DOTS, Dots, Mixture, in_blocks, lines
from moec.codegen.cpu.vector import Vector
from moec.target.cpu import CpuTarget

DEPTH = 64  # rows of w that a mixture takes at once: with TILES of columns, they fit the cache
ROWS = 256  # rows that outer products take at once


def product(target: CpuTarget, stack: MatrixStack, biased: bool, name: str = "product") -> PrimFunc:
    """A kernel (x[R, k], ends i32[E], w[E, n, k][, b[E, n]], y[R, n])."""
    v, dots = Vector(target), Dots(target, stack.k, stack.paired(target))
    width = 2 * v.lanes  # columns of y that a thread takes at once

    with kernel(name, target) as frame:
        r = T.int64()
        x = argument("x", (r, stack.k), stack.dtype)
        ends = argument("ends", (stack.experts,), "int32")
        w = argument("w", (stack.experts, stack.n, stack.k), stack.dtype)
        b = argument("b", (stack.experts, stack.n), stack.dtype) if biased else None
        y = argument("y", (r, stack.n), stack.dtype)
        with each_piece(stack, ends, r, -(-stack.n // width)) as span:
            column = T.bind(span.piece * width)
            sums = v.scratch((ROW_CHUNK, width), "float32")

            def chunk(base: Expr, count: Expr) -> None:
                with T.serial(0, width // DOTS) as quad:
                    first_column = T.bind(column + quad * DOTS)
                    # Sums after the last column repeat that column's and are not stored.
                    w_rows = [T.bind(T.min(first_column + j, stack.n - 1)) for j in range(DOTS)]
                    each = v.lanes * (2 if dots.paired else 1)

                    def fetch(step: Expr) -> None:
                        for j in range(DOTS):
                            v.prefetch(w, [span.expert, first_column + DOTS + j, step * each])

                    def dot(at: list[Expr]) -> None:
                        dots.emit(
                            len(at),
                            lambda i: (x, [base + at[i]]),
                            lambda j: (w, [span.expert, w_rows[j]]),
                            lambda i: (sums, [at[i], quad * DOTS]),
                            at[0] == 0,
                            fetch,
                        )

                    in_blocks(count, target.tile_rows, dot)
                with T.serial(0, count) as i:
                    for j, some_columns in existing(v, column, stack.n, width):
                        vectors = [v.load(sums, [i, j])]
                        if b is not None:
                            vectors = plus(v, vectors, b, [span.expert, column + j], some_columns)
                        put(v, y, [base + i, column + j], some_columns, vectors)

            def clear(row: Expr) -> None:
                for j, some_columns in existing(v, column, stack.n, width):
                    put(v, y, [row, column + j], some_columns, [v.splat(0.0)])

            chunks(span, ROW_CHUNK, chunk)
            zero_unowned_rows(span, stack, r, clear)
    return frame.function


def mixed(target: CpuTarget, stack: MatrixStack, biased: bool, name: str = "mixed") -> PrimFunc:
    """A kernel (dy[R, n], ends i32[E], w[E, n, k][, b[E, k]], dx[R, k])."""
    v, tile = Vector(target), Mixture(target, stack.paired(target))
    blocks = -(-stack.n // DEPTH)
    pair = 2 if tile.paired else 1

    with kernel(name, target) as frame:
        r = T.int64()
        dy = argument("dy", (r, stack.n), stack.dtype)
        ends = argument("ends", (stack.experts,), "int32")
        w = argument("w", (stack.experts, stack.n, stack.k), stack.dtype)
        b = argument("b", (stack.experts, stack.k), stack.dtype) if biased else None
        dx = argument("dx", (r, stack.k), stack.dtype)
        with each_piece(stack, ends, r, pieces(tile, stack.k)) as span:
            partial = v.scratch((ROW_CHUNK, TILES * tile.columns), "float32")

            def finish(row: Expr, column: Expr, count: int, sums: list[Expr]) -> None:
                if b is not None:
                    sums = plus(v, sums, b, [span.expert, column], count)
                put(v, dx, [row, column], count, sums)

            def chunk(base: Expr, count: Expr) -> None:
                with T.serial(0, blocks) as block:
                    n = T.bind(block * DEPTH)
                    depth = T.bind(T.min(T.int64(DEPTH), stack.n - n))

                    def columns(t: Expr, column: Expr, width: int) -> None:
                        def fetch(step: Expr) -> None:
                            for j in range(pair):
                                row = [span.expert, n + DEPTH + step * pair + j, column]
                                lines(v, w, row, width)

                        def vectors(at: list[Expr], step: Expr) -> list[Expr]:
                            with T.If(at[0] == 0), T.Then():
                                fetch(step)
                            return tile.vectors(
                                width,
                                step,
                                lambda row, c: (w, [span.expert, n + row, column + c]),
                            )

                        def mix(at: list[Expr]) -> None:
                            tile.emit(
                                len(at),
                                width,
                                T.truncdiv(depth, T.int64(pair)),
                                lambda i, s: _factor(v, dy, base + at[i], n, s, tile.paired),
                                lambda step: vectors(at, step),
                                lambda i, c, many, sums: finish(
                                    base + at[i], column + c, many, sums
                                ),
                                Partial(
                                    lambda i, c: (partial, [at[i], t * tile.columns + c]),
                                    block > 0,
                                    block == blocks - 1,
                                ),
                            )

                        in_blocks(count, target.tile_rows, mix)

                    columns_of(tile, stack.k, span.piece, columns)

            chunks(span, ROW_CHUNK, chunk)

            def clear(row: Expr) -> None:
                columns_of(
                    tile, stack.k, span.piece, lambda t, c, width: zero(v, dx, [row, c], width)
                )

            zero_unowned_rows(span, stack, r, clear)
    return frame.function


def outer(target: CpuTarget, stack: MatrixStack, name: str = "outer") -> PrimFunc:
    """A kernel (dy[R, n], x[R, k], ends i32[E], dw[E, n, k])."""
    v, tile = Vector(target), Mixture(target, stack.paired(target))
    high = TILES * target.tile_rows  # rows of dw that a thread takes at once
    pair = 2 if tile.paired else 1

    with kernel(name, target) as frame:
        r = T.int64()
        dy = argument("dy", (r, stack.n), stack.dtype)
        x = argument("x", (r, stack.k), stack.dtype)
        ends = argument("ends", (stack.experts,), "int32")
        dw = argument("dw", (stack.experts, stack.n, stack.k), stack.dtype)
        with each_piece(stack, ends, r, -(-stack.n // high), written=True) as span:
            n = T.bind(span.piece * high)
            rows = T.bind(T.min(T.int64(high), stack.n - n))
            partial = v.scratch((high, TILES * tile.columns), "float32")
            panel = v.scratch((ROWS // pair, tile.columns), tile.words)
            factors = v.scratch((ROWS // pair, high), "int32") if tile.paired else None

            def part(piece: Expr, base: Expr, count: Expr) -> None:
                odd = None
                if factors is not None:
                    _pair_rows(v, dy, base, count, n, rows, factors)
                    odd = T.truncmod(count, T.int64(2)) == 1

                def factor(i: Expr, step: Expr) -> Expr:
                    if factors is not None:
                        return factors[step, i]
                    return v.scalar(dy, [base + step, n + i])

                def columns(t: Expr, column: Expr, width: int) -> None:
                    tile.gather(
                        panel,
                        width,
                        T.truncdiv(count, T.int64(pair)),
                        lambda row, c: (x, [base + row, column + c]),
                        odd,
                    )

                    def mix(at: list[Expr]) -> None:
                        tile.emit(
                            len(at),
                            width,
                            ceildiv(count, pair),
                            lambda i, step: factor(at[i], step),
                            lambda step: tile.gathered(panel, width, step),
                            lambda i, c, many, sums: put(
                                v, dw, [span.expert, n + at[i], column + c], many, sums
                            ),
                            Partial(
                                lambda i, c: (partial, [at[i], t * tile.columns + c]),
                                base > span.first,
                                base + count == span.end,
                            ),
                        )

                    in_blocks(rows, target.tile_rows, mix)

                columns_of(tile, stack.k, piece, columns)

            with T.serial(0, pieces(tile, stack.k)) as piece:
                chunks(span, ROWS, lambda base, count: part(piece, base, count))
            with T.If(span.first == span.end), T.Then(), T.serial(0, rows) as i:
                with T.serial(0, pieces(tile, stack.k)) as piece:
                    columns_of(
                        tile,
                        stack.k,
                        piece,
                        lambda t, c, width: zero(v, dw, [span.expert, n + i, c], width),
                    )
    return frame.function


def _factor(v: Vector, dy: Buffer, row: Expr, n: Expr, step: Expr, paired: bool) -> Expr:
    return v.pair(dy, [row, n + step * 2]) if paired else v.scalar(dy, [row, n + step])


def _pair_rows(
    v: Vector, dy: Buffer, base: Expr, count: Expr, n: Expr, columns: Expr, panel: Buffer
) -> None:
    """panel[s, j] = the pair of dy[base + 2s, n + j] and the element below it, 0 after the end."""
    with T.serial(0, T.truncdiv(columns, T.int64(v.lanes))) as c:
        at = T.bind(c * v.lanes)
        lanes = T.ramp(at, 1, v.lanes)
        with T.serial(0, T.truncdiv(count, T.int64(2))) as s:
            row = T.bind(base + s * 2)
            both = v.pairs(dy, [row, n + at], [row + 1, n + at])
            T.buffer_store(panel, both, [s, lanes])
        with T.If(T.truncmod(count, T.int64(2)) == 1), T.Then():
            last = v.pairs(dy, [base + count - 1, n + at], None)
            T.buffer_store(panel, last, [T.truncdiv(count, T.int64(2)), lanes])
