"""A variable of a loop."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx import Buffer

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.scalars import Scalar


@dataclass(frozen=True, eq=False)
class Cell:
    """A variable in a dtype of the IR (half types: float32, bool: int8), see `Emission.cell`."""

    buffer: Buffer
    dtype: str

    def get(self) -> Scalar:
        return sc.load(self.buffer, [tirx.const(0, "int64")], self.dtype)

    def set(self, x: Scalar) -> None:
        sc.store(self.buffer, [tirx.const(0, "int64")], sc.cast(x, self.dtype))
