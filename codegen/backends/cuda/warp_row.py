"""A row of a generated loop that the lanes of a warp share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import WARP, shuffle_xor
from moec.codegen.loops.cells import Cell
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.scalars import Scalar


@dataclass(frozen=True)
class WarpRow:
    """`lane` is int64."""

    emission: Emission
    lane: Expr

    @contextmanager
    def elements(self, count: Expr) -> Iterator[Expr]:
        """A loop over the numbers below `count` of this lane: lane, lane + 32, ..."""
        turns = tirx.truncdiv(count - self.lane + (WARP - 1), tirx.const(WARP, "int64"))
        with T.serial(0, turns) as turn:
            yield T.bind(self.lane + turn * WARP)

    def merge(self, cells: Sequence[Cell], combine: Callable[[Sequence[Scalar]], None]) -> None:
        """Combines the cells of all lanes by a butterfly: in a fixed order, with the same result in
        every lane."""
        others = [self.emission.cell(cell.get()) for cell in cells]
        for step in (16, 8, 4, 2, 1):
            for cell, other in zip(cells, others, strict=True):
                T.buffer_store(other.buffer, _of_lane(cell.buffer, step), [0])
            combine([other.get() for other in others])


def _of_lane(buffer: Buffer, mask: int) -> Expr:
    """What the lane whose number differs in the bits of `mask` has in its buffer of one element."""
    dtype = str(buffer.dtype)
    wide = dtype if dtype.endswith(("32", "64")) and dtype[0] != "u" else "int32"
    return T.cast(shuffle_xor(T.cast(buffer[0], wide), mask, wide), dtype)
