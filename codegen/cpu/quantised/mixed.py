"""Products whose experts have several formats: a task takes the tile of its expert's format.

    table i32[E, 3]     the number of each expert's format, its place in the stack of that, and, in
                        row i, the i-th expert to be computed: those of a format follow each other,
                        as a tile prefetches the weights that its own format has next

The tiles of all formats have as many columns, so that experts share the tasks of one parallel loop
as in other products, and a row is computed as in a stack of one format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu.frame import argument
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.product import ProductOutput, TileProduct
from moec.codegen.cpu.gemm.sorted_rows import sorted_product
from moec.codegen.cpu.gemm.tile import Epilogue, RowRun, Tile
from moec.codegen.cpu.quantised.grouped import QuantisedWeights, quantised_tile
from moec.codegen.cpu.quantised.layout import QuantisedLayout, RowCodes
from moec.codegen.cpu.quantised.round_rows import RoundedRows
from moec.codegen.specs.products import MixedSpec
from moec.target.cpu import CpuTarget

RowForm = tuple[int, RowCodes]
"""The number of blocks and the layout of rows of codes."""


@dataclass(frozen=True)
class MixedLayout(Layout):
    """The layouts of the stacks of all formats."""

    spec: MixedSpec

    @property
    def parts(self) -> tuple[QuantisedLayout, ...]:
        each = self.spec.parts
        return tuple(QuantisedLayout(s, self.target, narrow=True) for s in each)

    @property
    def forms(self) -> tuple[RowForm, ...]:
        """The forms in which the stacks read rows, each once."""
        return tuple(dict.fromkeys((part.blocks, part.row_codes) for part in self.parts))

    @property
    def vectors(self) -> int:
        return self.parts[0].vectors

    @property
    def bytes(self) -> int:
        """The bytes of the weights of one group, on average."""
        return sum(part.bytes * part.spec.groups for part in self.parts) // self.spec.groups


class MixedWeights(NamedTuple):
    """The weights of each format, their biases, and the table."""

    parts: list[tuple[QuantisedWeights, Buffer | None]]
    table: Buffer


@dataclass(frozen=True)
class MixedTile(Tile):
    """Emits the tile of each format, under the condition that it is the expert's."""

    parts: tuple[Tile, ...]
    table: Buffer

    def expert_at(self, number: Expr) -> Expr:
        return self.table[number, 2]

    def rows(self, run: RowRun) -> None:
        after, column_after = run.following
        format, position = (T.bind(self.table[run.group, i]) for i in range(2))
        next_format, next_position = (T.bind(self.table[after, i]) for i in range(2))
        for number, part in enumerate(self.parts):
            with T.If(format == number), T.Then():
                next_one = T.bind(T.Select(next_format == number, next_position, position))
                part.rows(run._replace(group=position, following=(next_one, column_after)))


def mixed_linear(
    target: CpuTarget,
    spec: MixedSpec,
    top_k: int = 0,
    epilogue: Epilogue | None = None,
    scale_dtype: str | None = None,
    name: str = "mixed",
) -> PrimFunc:
    """A kernel ((codes, scales, sums of x[T, k]) in each of `MixedLayout.forms`[, order i32[R]],
    ends i32[E], (w, its scales[, its zeros][, bias packed]) of each format, table i32[E, 3][,
    scale[T, top_k]], y[R, n]), as documented in `sorted_product`."""
    layout = MixedLayout(spec, target)

    def rows(count: Expr) -> dict[RowForm, RoundedRows]:
        return {form: RoundedRows.of(count, spec.k, *form) for form in layout.forms}

    def weights(suffix: str, groups: Expr | int) -> MixedWeights:
        return MixedWeights(
            [_part(part, f"{suffix}_{number}") for number, part in enumerate(layout.parts)],
            argument("table", (groups, 3), "int32"),
        )

    def tile(x: dict[RowForm, RoundedRows], w: MixedWeights, out: ProductOutput) -> Tile:
        parts = [
            quantised_tile(
                part, x[part.blocks, part.row_codes], stack, out._replace(bias=bias), epilogue
            )
            for part, (stack, bias) in zip(layout.parts, w.parts, strict=True)
        ]
        return MixedTile(layout, parts[0].operands, epilogue, tuple(parts), w.table)

    product: TileProduct[Any, MixedWeights] = TileProduct(layout, rows, weights, tile, biased=False)
    return sorted_product(product, name, top_k, scale_dtype)


def _part(layout: QuantisedLayout, suffix: str) -> tuple[QuantisedWeights, Buffer | None]:
    groups, *sizes = layout.bias_shape
    weights = QuantisedWeights.of(layout, suffix, groups)
    bias = argument(f"bias{suffix}", (groups, *sizes), "float32") if layout.spec.bias else None
    return weights, bias
