"""What kernels of products share: whatever rows and weights are, they are read in one order.

Products of plain, of quantised and of compressed weights differ in the buffers that hold rows of
x and weights, and in the tile that multiplies them. The rest of a kernel is one for dense rows
(linear.py), and one for rows that are sorted by expert (sorted_rows.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from tvm.ir import Expr
from tvm.tirx import Buffer

from moec.codegen.cpu.frame import argument
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.tile import Tile

X = TypeVar("X")
W = TypeVar("W")


class ProductOutput(NamedTuple):
    """Where rows of y go, and what they are made of: fields of `Operands`, in its order."""

    y: Buffer
    bias: Buffer | None
    x_row: Callable[[Expr], Expr]
    scale: Callable[[Expr], Expr] | None
    gathered: bool


@dataclass(frozen=True)
class TileProduct(Generic[X, W]):
    """`rows(count)` and `weights(suffix)` declare arguments, `tile` multiplies what they gave."""

    layout: Layout
    rows: Callable[[Expr], X]
    weights: Callable[[str], W]
    tile: Callable[[X, W, ProductOutput], Tile]

    def bias(self, suffix: str) -> Buffer | None:
        """Declares the bias, where there is one."""
        layout = self.layout
        if not layout.spec.bias:
            return None
        return argument(f"bias{suffix}", layout.bias_shape, "float32")
