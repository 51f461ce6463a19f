"""The division of rows into blocks of at most the height of a register tile."""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T


def each_row_block(count: Expr, most: int, body: Callable[[Expr, int], None]) -> None:
    """Calls `body(row, m)` once for each block of rows: its first row and its number of rows. The
    code of a height is emitted once, for a short block and for a last one."""
    blocks, part, rest = row_blocks(count, most)
    with T.serial(0, blocks) as i:
        body(T.bind(i * most), most)
    with T.serial(0, T.Select(rest > 0, T.int64(2), T.int64(1))) as j:
        row = T.bind(T.Select(j == 0, blocks * most, count - rest))
        height = T.bind(T.Select(j == 0, part, rest))
        for m in range(1, most):
            with T.If(height == m), T.Then():
                body(row, m)


def row_blocks(count: Expr, most: int) -> tuple[Expr, Expr, Expr]:
    """`count` rows as (number of blocks of `most` rows, rows of a shorter block after them, rows
    of a last block); the second and third are 0 where there is no such block.

    An addition to a sum waits for the previous one, so a short block takes as long as a longer one.
    If few rows remain, they and the last full block become two blocks of half the rows.
    """
    blocks, left = (T.bind(op(count, T.int64(most))) for op in (T.truncdiv, T.truncmod))
    short = T.And(left > 0, left <= _few(most))
    shared = T.bind(T.And(blocks > 0, short))
    rest = T.bind(T.Select(shared, T.truncdiv(left + most, T.int64(2)), T.int64(0)))
    before = T.bind(count - rest)
    return (
        T.bind(T.truncdiv(before, T.int64(most))),
        T.bind(T.truncmod(before, T.int64(most))),
        rest,
    )


def _few(most: int) -> int:
    """Half a block; 0 for a block of two rows, which cannot be divided so."""
    return most // 2 if most > 2 else 0


def ceil_of(a: int, b: int) -> int:
    return -(-a // b)


def ceildiv(a: Expr, b: int) -> Expr:
    return T.truncdiv(a + (b - 1), T.int64(b))


def stop_of(start: Expr, block: int, total: int) -> Expr:
    """The end of a block, at most `total`. If all blocks are full it is start + block, so that
    loops over a block have a constant length."""
    stop = start + block
    return T.bind(stop if total % block == 0 else T.min(stop, T.int64(total)))
