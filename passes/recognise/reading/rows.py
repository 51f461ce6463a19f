"""Reads a region as the computation of one expert on its rows.

`Reader.read(value)` returns the value's `ExpertLayout`: the corresponding value of the body, and
how its axes hold rows and features. Values that are neither rows nor expert weights (masks, routing
weights, sort orders) are opaque: their layout is None. Reading writes the body with `BodyWriter`.
Reading does not decide whether the region is a block: the proof does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.ir.traits import CASTS, is_elementwise
from moec.passes.recognise.reading import elementwise, gathers, products
from moec.passes.recognise.reading.layout import ExpertLayout
from moec.passes.recognise.reading.opnames import ACROSS, PICKS, PRODUCTS, REARRANGE, SCATTERS
from moec.passes.recognise.reading.reader import BlockReader
from moec.passes.recognise.reading.row_wise import at_line
from moec.passes.recognise.reading.shared_rows import from_one_row
from moec.passes.recognise.region import Recipe


class Reader(BlockReader):
    """Reads one block, op by op."""

    def apply(self, op: Op) -> Sequence[ExpertLayout | None]:
        """The layouts of the op's outputs. Raises NoMatch if rows pass through an op that one
        expert's body cannot contain."""
        name = op.name
        if name in PRODUCTS:
            return [products.product(self, op)]
        fan = self.fans(op)
        if fan is not None:
            return [self.fan(op, fan)]
        if name == "aten.index_put.default" or name in SCATTERS:
            return [gathers.put(self, op)]
        if name == "aten.cat.default":
            return [elementwise.cat(self, op)]
        if not op.inputs:
            return [None] * len(op.outputs)
        first = self.read(op.inputs[0])
        if name in REARRANGE or name == "aten.repeat.default":
            return [None if first is None else self.move(op, first)]
        if name in PICKS:
            return [None if first is None else gathers.index(self, op, first)]
        if name == "nn.rms_norm":
            return [None if first is None else elementwise.norm(self, op, first)]
        if name == "aten.layer_norm.default":
            return [None if first is None else elementwise.layer_norm(self, op, first)]
        if name == "aten.gather.default":
            return [None if first is None else gathers.gather(self, op, first)]
        if name in ("aten.slice.Tensor", "aten.select.int", "aten.split_with_sizes.default"):
            return gathers.part(self, op, first)
        if name in ACROSS:
            return [None if first is None else elementwise.across(self, op, first)]
        if name in CASTS or is_elementwise(name):
            return [elementwise.pointwise(self, op)]
        layouts = [self.read(v) for v in op.inputs]
        if any(layout is not None and not layout.param for layout in layouts):
            raise NoMatch(
                f"rows go through {name}, which is not a computation of a single expert"
                f"{at_line(op)}"
            )
        return [None] * len(op.outputs)

    def body(self, result: ExpertLayout) -> tuple[Graph, tuple[Recipe, ...]]:
        """The body that computes `result`, and a recipe for the stack of each of its params."""
        body, stacks = self.writer.body(result, self.memo[cast(Value, self.x)].base)
        return (from_one_row(body, [*self.shared.values()]) if self.shared else body), stacks
