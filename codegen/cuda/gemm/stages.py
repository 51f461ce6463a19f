"""Stages of a product in shared memory: some are loaded by cp.async while another is multiplied.

    shared memory   stage 0 | stage 1 | ...         each the parts of a step, one after the other
    a row           16-byte pieces, piece p at p ^ key(row): eight rows that ldmatrix reads at
                    once are in eight different banks

While one stage is multiplied, all others are being loaded. Every thread waits for its own copies
before the barrier, so after it the stage is complete for all threads. The stage that is loaded next
is the one that all threads finished multiplying before that barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import DataType
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import barrier, commit_copies, copy_async, wait_copies

PIECE = 8
"""Elements of 16 bits in a piece, the 16 bytes that one copy moves."""


def elements(dtype: str, count: Expr) -> Expr:
    """The number of elements of `dtype` in the space of `count` elements of 16 bits."""
    return {8: count * 2, 16: count, 32: count // 2}[DataType(dtype).bits]


def halves(dtype: str, count: int) -> int:
    """The number of elements of 16 bits that occupy the space of `count` elements of `dtype`."""
    return count * int(DataType(dtype).bits) // 16


@dataclass(frozen=True)
class Part:
    """Rows of a matrix, of which a stage holds the `width` elements of its step; whole rows have
    `length`. Sizes are in elements of 16 bits, whatever the dtype. pointer(index of this thread's
    copy, element of the row) is the address to copy from."""

    rows: int
    width: int
    length: int
    pointer: Callable[[int, Expr], Expr]


@dataclass(frozen=True)
class Stages:
    """`count` stages of `size` elements, for the `steps` steps of a product."""

    buffer: Buffer
    count: int
    size: int
    steps: int
    threads: int
    thread: Expr

    def pieces(self, rows: int, width: int) -> list[tuple[Expr, Expr]]:
        """(row, piece) of each copy of this thread, for one part of a stage."""
        count = width // PIECE
        turns = range(rows * count // self.threads)
        indices = [T.bind(self.thread + turn * self.threads) for turn in turns]
        return [(T.bind(i // count), T.bind(i % count)) for i in indices]

    def offset(self, row: Expr, piece: Expr, width: int) -> Expr:
        """The offset in elements from the start of a part whose rows have 16, 32 or 64 elements."""
        pieces = width // PIECE
        key = T.shift_right(row, T.int32((8 // pieces).bit_length() - 1)) % pieces
        return row * width + T.bitwise_xor(piece, row % 8 if pieces == 8 else key) * PIECE

    def pointer(self, offset: Expr) -> Expr:
        return self.buffer.ptr_to([elements(str(self.buffer.dtype), offset)])

    def run(self, parts: Sequence[Part], multiply: Callable[[Expr, Expr], None]) -> None:
        """Runs multiply(start of the stage, number of the step) for each step, once its stage is
        complete. No thread reads the stages after it returns."""
        ahead = self.count - 1
        for stage in range(ahead):
            if stage < self.steps:
                self._load(stage, stage, parts)
            commit_copies()
        with T.serial(0, self.steps) as step:
            wait_copies(ahead - 1)
            barrier()
            with T.If(step + ahead < self.steps), T.Then():
                self._load((step + ahead) % self.count, step + ahead, parts)
            commit_copies()  # even an empty group: waiting counts groups
            multiply(T.bind(step % self.count * self.size), step)
        wait_copies(0)
        barrier()

    def _load(self, stage: Expr | int, step: Expr | int, parts: Sequence[Part]) -> None:
        base = stage * self.size
        for part in parts:
            for turn, (row, piece) in enumerate(self.pieces(part.rows, part.width)):
                column = step * part.width + piece * PIECE
                to = self.pointer(base + self.offset(row, piece, part.width))
                if part.length % part.width == 0:
                    copy_async(to, part.pointer(turn, column))
                else:
                    inside = T.if_then_else(column < part.length, T.uint32(16), T.uint32(0))
                    last = T.min(column, part.length - PIECE)
                    copy_async(to, part.pointer(turn, last), inside)
            base = base + part.rows * part.width
