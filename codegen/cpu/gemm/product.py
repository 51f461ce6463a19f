"""The interface between a tile and the loops around it, for all kinds of rows and weights.

Products of plain, of quantised and of compressed weights differ in the buffers that hold rows of x
and weights, and in the tile that multiplies them. The rest of a kernel is shared: linear.py for
dense rows, sorted_rows.py for rows that are sorted by expert.
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
    """The output of a product and its operands except x and w: fields of `Operands`, in order."""

    y: Buffer
    bias: Buffer | None
    x_row: Callable[[Expr], Expr]
    scale: Callable[[Expr], Expr] | None
    gathered: bool


@dataclass(frozen=True)
class TileProduct(Generic[X, W]):
    """`rows(count)` and `weights(suffix, groups)` declare arguments, the weights of so many groups;
    `tile` multiplies them. `biased`: biases, if there are any, are not among the weights."""

    layout: Layout
    rows: Callable[[Expr], X]
    weights: Callable[[str, Expr | int], W]
    tile: Callable[[X, W, ProductOutput], Tile]
    biased: bool = True

    def bias(self, suffix: str, groups: Expr | int) -> Buffer | None:
        """Declares the bias of so many groups if the product has one."""
        layout = self.layout
        if not (layout.spec.bias and self.biased):
            return None
        return argument(f"bias{suffix}", (groups, *layout.bias_shape[1:]), "float32")
