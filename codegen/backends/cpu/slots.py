"""Arguments of products whose experts are read from disk into slots (codegen/cpu/expert_store.c).

plan = moec_store_plan(key, ends, rows)    before the first product
product(rows, order, ends, key, plan, weights in slots, ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tvm import relax, tirx

from moec.codegen.module_builder import Lowering, Param
from moec.ir.graph import TensorType, Value
from moec.runtime.package import Stack

PLAN = "moec_store_plan"
"""The function of the store that plans a call of a layer."""


@dataclass
class SlotArguments:
    """The stacks of a function under construction, by the ends of the rows of their experts: each
    such value is a layer."""

    stacks: dict[Value, list[Stack]] = field(default_factory=dict)

    def layers(self) -> tuple[tuple[Stack, ...], ...]:
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
        stack = Stack(f"{names[0]}.key", layer, names)
        self.stacks.setdefault(ends, []).append(stack)
        key = low.param(stack.key, Param(stack.key, TensorType("i64", (2,)), ()))
        experts = ends.shape[0]
        assert isinstance(experts, int)
        # A plan follows the products before it: the first one of a layer fills slots.
        call = relax.call_dps_packed(
            PLAN,
            relax.Tuple([key, low.value(ends), rows]),
            relax.TensorType([experts + 1], "int32"),
        )
        return [key, low.builder.emit(call), *(_in_slots(low, *one) for one in packed)]


def _in_slots(low: Lowering, key: object, param: Param) -> relax.Var:
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
