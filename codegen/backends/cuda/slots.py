"""Arguments of products whose experts are copied into slots of the GPU's memory
(codegen/cuda/expert_store.c).

table = moec_device_store_plan(key, ends)    before the first product of a layer
product(rows, order, ends, key, table, weights in slots, ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tvm import relax

from moec.codegen.backends.cpu.slots import in_slots, used_once
from moec.codegen.module_builder import Lowering, Param
from moec.ir.graph import TensorType, Value
from moec.runtime.package import Stack

PLAN = "moec_device_store_plan"
"""The function of the store that plans a call of a layer."""


@dataclass
class DeviceSlots:
    """The stacks of a function under construction, by the ends of the rows of their experts: each
    such value is a layer, which has one table."""

    stacks: dict[Value, list[Stack]] = field(default_factory=dict)
    tables: dict[Value, relax.Expr] = field(default_factory=dict)

    def layers(self) -> tuple[tuple[Stack, ...], ...]:
        return tuple(map(tuple, self.stacks.values()))

    def add(
        self, low: Lowering, ends: Value, packed: Sequence[tuple[object, Param]], layer: str
    ) -> tuple[list[relax.Expr], list[relax.Expr]]:
        """The key and the table, and the weights."""
        names = tuple(param.name for _, param in packed)
        stack = Stack(f"{names[0]}.key", layer, names)
        self.stacks.setdefault(ends, []).append(stack)
        key = low.param(stack.key, Param(stack.key, TensorType("i64", (2,)), ()))
        if ends not in self.tables:
            experts = ends.shape[0]
            assert isinstance(experts, int)
            call = relax.call_dps_packed(
                PLAN,
                relax.Tuple([key, low.value(ends)]),
                relax.TensorType([2 * experts], "int32"),
            )
            self.tables[ends] = low.builder.emit(call)
        return [key, self.tables[ends]], [in_slots(low, *one) for one in packed]


def placed(
    low: Lowering, ends: Value, packed: Sequence[tuple[object, Param]], layer: str
) -> tuple[list[relax.Expr], list[relax.Expr]]:
    """What a product needs besides its weights, which is nothing where all experts are resident,
    and the weights."""
    if low.slots is None or not used_once(low, packed):
        return [], [low.param(*one) for one in packed]
    slots: DeviceSlots = low.slots
    return slots.add(low, ends, packed, layer)
