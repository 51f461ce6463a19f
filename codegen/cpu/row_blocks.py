"""How rows fall into blocks, each as high as a register tile or less."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T


def row_blocks(count: Expr, most: int, streamed: bool) -> tuple[Expr, Expr, Expr]:
    """Rows as blocks of `most`, and one or two shorter ones: how many, and the rows of those.

    An addition to a sum waits for the one before, so few rows take as long as some more. Where
    half a block or less is left, the last whole one shares its rows with it. Not so the first one
    where it waits for weights that are `streamed` from memory: then it had better be whole.
    """
    least = 1 if streamed else 0
    numbers = [T.int64(number) for number in (most, _few(most), least)]
    rest = T.bind(T.call_extern("int64", "moec_shared_rows", count, *numbers))
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


SHARED_ROWS = """
define linkonce_odr i64 @moec_shared_rows(i64 %n, i64 %most, i64 %few, i64 %least) alwaysinline {
  %whole = udiv i64 %n, %most
  %left = urem i64 %n, %most
  %enough = icmp ugt i64 %whole, %least
  %some = icmp ne i64 %left, 0
  %short = icmp ule i64 %left, %few
  %both = and i1 %some, %short
  %shared = and i1 %both, %enough
  %sum = add i64 %left, %most
  %half = lshr i64 %sum, 1
  %r = select i1 %shared, i64 %half, i64 0
  ret i64 %r
}
"""
"""The rows of the last block where the one before shares with it, else 0. TVM, which would try
every case of such conditions, is told nothing of them."""


def ceil_of(a: int, b: int) -> int:
    return -(-a // b)


def ceildiv(a: Expr, b: int) -> Expr:
    return T.truncdiv(a + (b - 1), T.int64(b))
