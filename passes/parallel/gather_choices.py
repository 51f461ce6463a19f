"""Applies a capacity to the tokens of all ranks together, as a single process does.

    kept = moe.capacity(ids) <capacity=C(T)>     count = dist.row_count(ids)
                                                 counts = dist.all_gather(count) <group="world">
                                           ->    all = dist.all_gather(ids, counts) <rows=T'>
                                                 limited = moe.capacity(all) <capacity=C(T')>
                                                 kept = dist.local_rows(limited, counts) <rows=T>

T' is the sum of the counts. Choices are small (8 bytes each), and every rank computes the same
result from them. Routers that rank or count tokens by other ops (a random selection, expert choice,
weights divided by the sum of the choices that fit) would do so on one rank's tokens: refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import sympy

from moec.errors import UnsupportedError
from moec.ir.graph import Attr, Graph, Op, TensorType, Value
from moec.ir.opdef import OPS
from moec.ir.sizes.dims import Bounds, Dim, canonical, symbol, symbols
from moec.ir.traits import PRODUCTS
from moec.passes.core.moe_layer import MOVES, Splice, name_of
from moec.plan.groups import WORLD

_AMONG_TOKENS = frozenset(
    f"aten.{name}"
    for name in ("argsort.default", "cumsum.default", "sort.default", "sort.stable", "topk.default")
)
"""Ops by which tokens compete for the slots of an expert."""


def gather_choices(splice: Splice, ranks: int) -> dict[str, Bounds]:
    """Replaces every moe.capacity of the program. Returns the bounds of the new sizes.

    Raises UnsupportedError if a capacity depends on more than the number of tokens, or a choice or
    its weight on other tokens.
    """
    bounds: dict[str, Bounds] = {}
    for op in splice.program.graph.ops:
        if op.name == "moe.dispatch":
            _require_independent_tokens(splice.program.graph, op, op.inputs[1])
        elif op.name == "moe.combine" and op.attrs.get("weighted"):
            _require_independent_tokens(splice.program.graph, op, op.inputs[2])
    for number, op in enumerate(o for o in splice.program.graph.ops if o.name == "moe.capacity"):
        name = f"all_tokens{number}"
        splice.put(op, _counted_over_all(splice, op, ranks, name))
        bounds[name] = Bounds(0, None)
    return bounds


def _require_independent_tokens(graph: Graph, layer: Op, choices: Value) -> None:
    """Raises UnsupportedError if an op between the logits and `choices` [T, k] compares tokens."""
    tokens, waiting, ops = choices.shape[0], [choices], set[Op]()
    while waiting:
        op = graph.producers.get(waiting.pop())
        if op is None or op in ops or _multiplies_weights(graph, op):
            continue
        ops.add(op)
        axis = cast(int, op.attrs.get("dim", -1))
        if op.name in _AMONG_TOKENS and op.inputs[0].shape[axis] == tokens:
            raise UnsupportedError(
                f"{name_of(layer)}: its router applies {op.name} at {op.origin or op.outputs[0]} "
                "over the tokens of one rank, and the model over those of all ranks; only a "
                "capacity that keeps the first tokens can be counted over several ranks: write the "
                "router so, or compile the model for one rank"
            )
        waiting += op.inputs


def _multiplies_weights(graph: Graph, op: Op) -> bool:
    """Whether it is a product with a stored weight, perhaps moved, such as that of the logits."""
    makers = [graph.producers.get(value) for value in op.inputs]
    sources = {*op.inputs, *(m.inputs[0] for m in makers if m is not None and m.name in MOVES)}
    return op.name in PRODUCTS and not sources.isdisjoint(graph.params)


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
