"""A program that also returns its routers' choices, for `moec.runtime.call.recorder`.

    f(x) -> y                        f(x) -> y, i_0, i_1
    w_0, i_0 = moe.gate(h_0)    ->   w_0, i_0 = moe.gate(h_0)
    … = moe.sort(i_0)                … = moe.sort(i_0)

Exact: no op changes; the choices become additional outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moec.errors import NoMatch
from moec.ir.graph import Graph, Program, Value
from moec.ir.opdef import integer
from moec.ir.sizes.dims import Dim, show_dim
from moec.passes.core.moe_layer import name_of


@dataclass(frozen=True)
class LayerChoices:
    """The choices [T, k] of a layer, among `experts`."""

    layer: str
    experts: int
    choices: Value


def recorded_layers(graph: Graph) -> tuple[LayerChoices, ...]:
    """The layers that sort rows by expert; layers that share a sort count as one."""
    layers: dict[Value, LayerChoices] = {}
    for op in graph.ops:
        if op.name == "moe.sort":
            choices = op.inputs[0]
        elif op.name == "moe.dispatch" and not op.attrs.get("sorted"):
            choices = op.inputs[1]
        else:
            continue
        layers.setdefault(choices, LayerChoices(name_of(op), integer(op, "num_experts"), choices))
    return tuple(layers.values())


def with_choices(program: Program, rows: Sequence[Dim] | None = None) -> Program:
    """The program whose last outputs are the choices of its layers, in order.

    A trace has one row per token, so all layers must route the same number of rows, or one of the
    numbers in `rows`. Raises NoMatch otherwise, and for a program without routed layers.
    """
    layers = recorded_layers(program.graph)
    if not layers:
        raise NoMatch("no layer routes tokens to experts")
    allowed = rows or (layers[0].choices.shape[0],)
    for layer in layers:
        count = layer.choices.shape[0]
        if count not in allowed:
            expected = " or ".join(map(show_dim, allowed))
            raise NoMatch(
                f"{layer.layer} routes {show_dim(count)} rows and other layers {expected}: a "
                "trace has one row per token"
            )
    graph = program.graph
    outputs = (*graph.outputs, *(layer.choices for layer in layers))
    return replace(program, graph=replace(graph, outputs=outputs))
