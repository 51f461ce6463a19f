"""Applies a capacity to the tokens of all ranks together, as a single process does.

    kept = moe.capacity(ids) <capacity=C(T)>     count = dist.row_count(ids)
                                                 counts = dist.all_gather(count) <group="world">
                                           ->    all = dist.all_gather(ids, counts) <rows=T'>
                                                 limited = moe.capacity(all) <capacity=C(T')>
                                                 kept = dist.local_rows(limited, counts) <rows=T>

T' is the sum of the counts. Choices are small (8 bytes each), and every rank computes the same
result from them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import sympy

from moec.errors import UnsupportedError
from moec.ir.dims import Bounds, Dim, canonical, symbol, symbols
from moec.ir.graph import Attr, Op, TensorType, Value
from moec.ir.opdef import OPS
from moec.passes.core.moe_layer import Splice
from moec.plan.groups import WORLD


def gather_choices(splice: Splice, ranks: int) -> dict[str, Bounds]:
    """Replaces every moe.capacity of the program. Returns the bounds of the new sizes.

    Raises UnsupportedError if a capacity depends on more than the number of tokens.
    """
    bounds: dict[str, Bounds] = {}
    for number, op in enumerate(o for o in splice.program.graph.ops if o.name == "moe.capacity"):
        name = f"all_tokens{number}"
        splice.put(op, _counted_over_all(splice, op, ranks, name))
        bounds[name] = Bounds(0, None)
    return bounds


def _counted_over_all(splice: Splice, op: Op, ranks: int, name: str) -> list[Op]:
    (ids,), tokens = op.inputs, op.inputs[0].shape[0]
    capacity = _capacity_of(op, tokens, symbol(name))
    ops: list[Op] = []

    def emit(kind: str, *inputs: Value, **attrs: Attr) -> Value:
        draft = Op(kind, inputs, (), attrs, None, op.origin)
        (type,) = OPS[kind].infer(draft)
        value = splice.value(kind.partition(".")[2], type)
        ops.append(replace(draft, outputs=(value,)))
        return value

    count = emit("dist.row_count", ids)
    counts = emit("dist.all_gather", count, group=WORLD, rows=ranks)
    total = splice.emit(ops, "aten.sum.default", (counts,), TensorType("i64", ()), op)
    emit("moec.size", total, name=name)
    everyone = emit("dist.all_gather", ids, counts, group=WORLD, rows=symbol(name))
    limited = emit("moe.capacity", everyone, **{**op.attrs, "capacity": capacity})
    local = emit("dist.local_rows", limited, counts, group=WORLD, rows=tokens)
    ops[-1] = replace(ops[-1], outputs=op.outputs)
    assert local.type == op.outputs[0].type
    return ops


def _capacity_of(op: Op, tokens: Dim, total: sympy.Symbol) -> Dim:
    """The capacity for `total` tokens. Raises UnsupportedError if it depends on another size."""
    capacity = cast(Dim, op.attrs["capacity"])
    if isinstance(capacity, int):
        return capacity
    changed = canonical(capacity.subs(tokens, total))
    if others := symbols(changed) - {total.name}:
        raise UnsupportedError(
            f"{op.origin}: its capacity {capacity} depends on {', '.join(sorted(others))}, not "
            f"on the number of tokens {tokens} alone; it cannot be counted over several ranks"
        )
    return changed
