"""Variables of a loop, and its writes to computed positions, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Buffer

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.index import Position
from moec.codegen.loops.scalars import Join, Scalar
from moec.ir.graph import Value
from moec.ir.sizes.dims import Dim


@dataclass(frozen=True, eq=False)
class Cell:
    """A variable in a dtype of the IR (half types: float32, bool: int8), see `Emission.cell`."""

    buffer: Buffer
    dtype: str

    def get(self) -> Scalar:
        return sc.load(self.buffer, [tirx.const(0, "int64")], self.dtype)

    def set(self, x: Scalar) -> None:
        sc.store(self.buffer, [tirx.const(0, "int64")], sc.cast(x, self.dtype))


@dataclass(frozen=True)
class Writes:
    """A write at every position of `shape`, in order: x(position) is joined with the element of
    `out` at to(position), or without `join` replaces it, where that is inside. Positions that
    differ along the axes `apart` write to different elements."""

    out: Value
    shape: tuple[Dim, ...]
    to: Callable[[Position], tuple[Position, Expr]]
    x: Callable[[Position], Scalar]
    join: Join | None
    apart: tuple[int, ...] = ()
