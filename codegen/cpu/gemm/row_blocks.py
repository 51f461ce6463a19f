"""How rows fall into blocks, each as high as a register tile or less."""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T


def each_row_block(count: Expr, most: int, some: Callable[[Expr, int], None]) -> None:
    """`some(row, m)` for the m rows from each block's first row on."""
    whole, part, rest = row_blocks(count, most)
    with T.serial(0, whole) as i:
        some(T.bind(i * most), most)
    for m in range(1, most):
        with T.If(part == m), T.Then():
            some(T.bind(whole * most), m)
    for m in halves(most):
        with T.If(rest == m), T.Then():
            some(T.bind(count - m), m)


def row_blocks(count: Expr, most: int) -> tuple[Expr, Expr, Expr]:
    """Rows as blocks of `most`, and one or two shorter ones: how many, and the rows of those.

    An addition to a sum waits for the one before, so few rows take as long as some more. Where
    half a block or less is left, the last whole one shares its rows with it.
    """
    whole, left = (T.bind(op(count, T.int64(most))) for op in (T.truncdiv, T.truncmod))
    short = T.And(left > 0, left <= _few(most))
    shared = T.bind(T.And(whole > 0, short))
    rest = T.bind(T.Select(shared, T.truncdiv(left + most, T.int64(2)), T.int64(0)))
    before = T.bind(count - rest)
    return (
        T.bind(T.truncdiv(before, T.int64(most))),
        T.bind(T.truncmod(before, T.int64(most))),
        rest,
    )


def halves(most: int) -> list[int]:
    """What the last block may have, where two share the rows that are left."""
    return sorted({(most + left) // 2 for left in range(1, _few(most) + 1)})


def _few(most: int) -> int:
    """Half a block; of two rows, none: its two shares would be a whole one, and the same one."""
    return most // 2 if most > 2 else 0


def ceil_of(a: int, b: int) -> int:
    return -(-a // b)


def ceildiv(a: Expr, b: int) -> Expr:
    return T.truncdiv(a + (b - 1), T.int64(b))


def stop_of(start: Expr, block: int, whole: int) -> Expr:
    """Where a block ends; where all are whole, so that loops over them have a known length."""
    stop = start + block
    return T.bind(stop if whole % block == 0 else T.min(stop, T.int64(whole)))
