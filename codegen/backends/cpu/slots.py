"""Arguments of products whose experts are read from disk into slots (codegen/cpu/expert_store.c).

plan = moec_store_plan(key, ends, rows[, ids, weights][, guess])    before the first product
product(rows, order, ends, key, plan, weights in slots, ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tvm import relax, tirx

from moec.codegen.module_builder import Lowering, Param
from moec.errors import UsageError
from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import inputs_of
from moec.ops.experts.dispatch import SORTS
from moec.runtime.package import NARROW_KINDS, Stack

PLAN = "moec_store_plan"
"""The function of the store that plans a call of a layer."""
_WEIGHTED = ("moe.combine", "grouped.combine", "grouped.linear")


@dataclass
class SlotArguments:
    """The stacks of a function under construction, by the ends of the rows of their experts: each
    such value is a layer. `tiers`: experts have narrow copies."""

    stacks: dict[Value, list[Stack]] = field(default_factory=dict)
    tiers: bool = False
    refusal: str = ""

    def layers(self) -> tuple[tuple[Stack, ...], ...]:
        """Raises UsageError where experts can have no narrow copies."""
        if self.refusal:
            raise UsageError(f"--tiers {self.refusal}: leave it out")
        return tuple(map(tuple, self.stacks.values()))

    def add(
        self,
        low: Lowering,
        ends: Value,
        rows: relax.Expr,
        packed: Sequence[tuple[object, Param]],
        layer: str,
    ) -> list[relax.Expr]:
        """The key, the plan and the weights of a product of `rows`."""
        names = tuple(param.name for _, param in packed)
        narrow = packed[0][1].values[0].dtype if self.tiers else ""
        if narrow not in (*NARROW_KINDS, ""):
            self.refusal = f"copies weights of 16 or 32 bits, and those of {layer} have fewer"
        stack = Stack(f"{names[0]}.key", layer, names, narrow)
        sort = low.graph.producers[ends]
        more: list[Value] = []
        if ends not in self.stacks:
            routing = _routing(low, sort) if self.tiers else []
            if self.tiers and not routing:
                self.refusal = f"needs routing weights, and {layer} has none before its experts"
            more += routing
            more += sort.inputs[1:] if sort.name == "moe.sort" else ()
        self.stacks.setdefault(ends, []).append(stack)
        key = low.param(stack.key, Param(stack.key, TensorType("i64", (2,)), ()))
        experts = ends.shape[0]
        assert isinstance(experts, int)
        # A plan follows the products before it: the first one of a layer fills slots.
        call = relax.call_dps_packed(
            PLAN,
            relax.Tuple([key, low.value(ends), rows, *map(low.value, more)]),
            relax.TensorType([experts + 1], "int32"),
        )
        return [key, low.builder.emit(call), *(in_slots(low, *one) for one in packed)]


def _routing(low: Lowering, sort: Op) -> list[Value]:
    """The ids and weights [T, k] of the choices that `sort` sorts; empty where there are none."""
    readers = (op for value in sort.outputs for op in low.graph.readers.get(value, ()))
    for op in (sort, *readers):
        inputs = inputs_of(op) if op.name in (*SORTS, *_WEIGHTED) else {}
        weights = inputs.get("weights", inputs.get("scale"))
        if weights is not None and weights in low.values:
            return [sort.inputs[sort.name == "moe.dispatch"], weights]
    return []


def in_slots(low: Lowering, key: object, param: Param) -> relax.Var:
    """The weight argument of that key, for any number of experts."""
    if key not in low.params:
        _, *shape = low.type(param.type).shape.values
        type = relax.TensorType([tirx.Var("slots", "int64"), *shape], low.type(param.type).dtype)
        low.params[key] = (param, relax.Var(param.name, type))
    return low.params[key][1]


def used_once(low: Lowering, packed: Sequence[tuple[object, Param]]) -> bool:
    """Whether no other op reads these weights: a stack belongs to one layer."""
    values = [value for _, param in packed for value in param.values]
    return all(len(low.graph.readers.get(value, ())) == 1 for value in values)
