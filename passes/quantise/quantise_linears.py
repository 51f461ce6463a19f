"""The weights of linear layers are quantised to few bits: opt-in and approximate.

    y = aten.linear(x, w[N, K], b?)   ->   y = nn.quantised_linear(x, w.codes, w.scales, b?)

Decoding reads these weights for every token: projections of attention, shared experts, dense
layers, and the head, the largest. The head (the layer that computes the outputs, up to casts,
scalings and slices) has a separate option. Routers are not quantised, as an error in a score may
send a token to another expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.formats.notation import Format
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.experts.dispatch import SORTS
from moec.ir.traits import PRODUCTS
from moec.passes.core.rewrite import Builder
from moec.passes.quantise.codes import WIDE, Codes, QuantisingPass, attributes

LINEAR = "aten.linear.default"
LINEARS = (LINEAR, "nn.quantised_linear")
FEW = 16
"""Layers with at most as many outputs are not quantised: the gate of a shared expert has one."""


@dataclass(frozen=True)
class QuantiseLinears(QuantisingPass):
    """Store linear layers in few bits (--quant linears=…,head=…)."""

    linears: Format | None = None
    head: Format | None = None
    name: ClassVar[str] = "quantise-linears"

    def targets(self, graph: Graph) -> list[tuple[Op, Format]]:
        left_out, last, params = routers(graph), heads(graph), set(graph.params)
        targets = []
        for op in graph.ops:
            if op.name == LINEAR and op.inputs[1] in params and op not in left_out:
                format = self.head if op in last else self.linears
                if format is not None:
                    targets.append((op, format))
        return targets

    def quantised(self, op: Op, format: Format, codes: Codes, b: Builder) -> Sequence[Value]:
        x, weight, *bias = op.inputs
        if isinstance(weight.shape[0], int) and weight.shape[0] < FEW:
            raise NoMatch(f"it has only {weight.shape[0]} outputs: quantising it saves too little")
        codes.check(weight, format)
        if x.dtype not in WIDE or op.outputs[0].dtype != x.dtype:
            raise NoMatch(f"the rows {x} are not of {', '.join(WIDE)}")
        attrs = attributes(format) | ({"biased": True} if bias else {})
        inputs = [x, *codes.params(weight, format, b), *bias]
        return b.emit("nn.quantised_linear", inputs, like=op, attrs=attrs)


def routers(graph: Graph) -> set[Op]:
    """The linear layers whose results choose experts, through ops other than products."""
    return set().union(*logits_and_sums(graph))


def logits_and_sums(graph: Graph) -> tuple[set[Op], set[Op]]:
    """Of `routers` those that compute logits, and those that add up probabilities of experts that
    were merged."""
    chosen = [op.inputs[0] for op in graph.ops if op.name == "moe.route"]
    for op in graph.ops:
        if op.name in SORTS:
            chosen += [v for v in op.inputs if v.dtype in ("i32", "i64")]
    linears = _linears_behind(graph, chosen, lambda op: True)
    sums = {op for op in linears if _is_softmax(graph, op.inputs[0])}
    summed = _linears_behind(graph, [op.inputs[0] for op in sums], lambda op: True)
    return linears - sums | summed, sums


def _is_softmax(graph: Graph, value: Value) -> bool:
    op = graph.producers.get(value)
    return op is not None and op.name == "aten.softmax.int"


def heads(graph: Graph) -> set[Op]:
    """The linear layers that compute the outputs, up to casts, scalings and slices."""
    return _linears_behind(graph, graph.outputs, _reshapes)


def _reshapes(op: Op) -> bool:
    """Whether an op has one input that is no scalar: a cast, a scaling, a slice, a soft cap."""
    return sum(v.shape != () for v in op.inputs) == 1


def _linears_behind(
    graph: Graph, values: Sequence[Value], through: Callable[[Op], bool]
) -> set[Op]:
    """The linear layers that `values` come from, through ATen ops other than products."""
    linears: set[Op] = set()
    visited: set[Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        op = graph.producers.get(value)
        if value in visited or op is None:
            continue
        visited.add(value)
        if op.name in LINEARS:
            linears.add(op)
        elif op.name.startswith("aten.") and op.name not in PRODUCTS and through(op):
            waiting += op.inputs
    return linears
