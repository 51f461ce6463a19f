"""The dense feed-forward networks of a graph: linear layers to H channels, functions of each
channel alone, and a linear layer back.

    g = aten.linear(x, w1[H, D])
    u = aten.linear(x, w3[H, D])
    a = aten.silu(g)
    h = aten.mul(a, u)
    y = aten.linear(h, w2[D, H])

Channels are independent: the sum over any partition of the channels is the network's result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, TensorType, Value
from moec.ir.sizes.dims import symbol
from moec.ir.traits import is_pointwise
from moec.passes.core.runner import Log

LINEAR = "aten.linear.default"


@dataclass(frozen=True, eq=False)
class FeedForwardOps:
    """The `first` linear layers read `x` [.., D] and give H channels each, the `inner` ops combine
    them into `hidden` [.., H], and `down` reads that. Ops are in the order of the graph."""

    name: str
    first: tuple[Op, ...]
    inner: tuple[Op, ...]
    down: Op

    @property
    def x(self) -> Value:
        return self.first[0].inputs[0]

    @property
    def hidden(self) -> Value:
        """The input of `down`: [.., H]."""
        return self.down.inputs[0]

    @property
    def channels(self) -> int:
        return cast(int, self.down.inputs[1].shape[1])

    @property
    def output(self) -> Value:
        return self.down.outputs[0]


def feedforwards(graph: Graph, log: Log) -> Iterator[FeedForwardOps]:
    """The feed-forward networks of a graph, in order. Logs the reason for each that cannot be
    split by channels."""
    for op in graph.ops:
        ffn = _match_network(graph, op) if op.name == LINEAR else None
        if ffn is not None:
            try:
                yield _check_channels(graph, ffn)
            except NoMatch as why:
                log.decline(ffn.name, str(why))


def _match_network(graph: Graph, down: Op) -> FeedForwardOps | None:
    """The network that ends in `down`; None unless only linear layers and pointwise ops feed it."""
    inside: dict[Op, None] = {}
    waiting = [down.inputs[0]]
    while waiting:
        op = graph.producers.get(waiting.pop())
        if op is None or not (op.name == LINEAR or is_pointwise(op)):
            return None
        if op not in inside:
            inside[op] = None
            waiting += op.inputs if op.name != LINEAR else ()
    ordered = sorted(inside, key=graph.ops.index)
    first = tuple(op for op in ordered if op.name == LINEAR)
    inner = tuple(op for op in ordered if op.name != LINEAR)
    return FeedForwardOps(_name(first, down), first, inner, down) if inner else None


def _name(first: tuple[Op, ...], down: Op) -> str:
    """The path of the network in the model: the common prefix of its linear layers' origins."""
    origins = [op.origin.split(".") for op in (*first, down)]
    shared = [a[0] for a in zip(*origins, strict=False) if len(set(a)) == 1]
    return ".".join(shared) or down.outputs[0].name


def _check_channels(graph: Graph, ffn: FeedForwardOps) -> FeedForwardOps:
    """Raises NoMatch if the network's channels have other readers, or differ in shape."""
    ops = (*ffn.first, *ffn.inner, ffn.down)
    for op in (*ffn.first, ffn.down):
        if any(v not in graph.params for v in op.inputs[1:]):
            raise NoMatch(f"the weights of {op.outputs[0].name} are computed, not stored")
    for op in ffn.first:
        if op.inputs[0] is not ffn.x:
            names = f"{ffn.x.name} and {op.inputs[0].name}"
            raise NoMatch(f"its linear layers do not all read the same: {names}")
    for op in ops[:-1]:
        (value,) = op.outputs
        if value.shape != ffn.hidden.shape:
            raise NoMatch(f"{value} mixes channels before {ffn.hidden}")
        others = [r for r in graph.readers.get(value, ()) if r not in ops]
        if others or value in graph.results:
            reader = others[0].name if others else "an output of the model"
            raise NoMatch(f"its channels {value.name} are also read by {reader}")
    return ffn


def body(ffn: FeedForwardOps, channels: int, biased: bool) -> Graph:
    """The network with `channels` channels over rows [R, D]; its params are those of `weights`."""
    rows = symbol("R")
    names = {v.name for op in (*ffn.first, *ffn.inner, ffn.down) for v in op.outputs}

    def named(name: str, type: TensorType) -> Value:
        while name in names:
            name += "_"
        names.add(name)
        return Value(name, type)

    width = ffn.output.shape[-1]
    x = named("x", TensorType(ffn.x.dtype, (rows, ffn.x.shape[-1])))
    new: dict[Value, Value] = {ffn.x: x}
    params: list[Value] = []
    ops: list[Op] = []
    for op in (*ffn.first, *ffn.inner, ffn.down):
        inputs = [new[v] for v in op.inputs if v in new]
        outer = width if op is ffn.down else channels
        inner = channels if op is ffn.down else ffn.x.shape[-1]
        for weight in _stored_params(ffn, op, biased):
            shape = (outer, inner) if len(weight.shape) == 2 else (outer,)
            params.append(named(f"p{len(params)}", TensorType(weight.dtype, shape)))
            inputs.append(params[-1])
        (old,) = op.outputs
        new[old] = Value(old.name, TensorType(old.dtype, (rows, outer)))
        ops.append(replace(op, inputs=tuple(inputs), outputs=(new[old],), origin=""))
    return Graph((x,), tuple(params), tuple(ops), (new[ffn.output],), name="body")


def weights(
    program: Program, ffn: FeedForwardOps, channels: torch.Tensor, biased: bool
) -> list[tuple[str, torch.Tensor]]:
    """The name of each weight and its slice for `channels`, i64[C]: of the first layers weights
    and biases in turn, of the last one its weight and, where `biased`, its bias."""
    slices = []
    for op in (*ffn.first, ffn.down):
        for value in _stored_params(ffn, op, biased):
            tensor = program.weights[value.name]
            if op is not ffn.down:
                tensor = tensor[channels]
            elif len(value.shape) == 2:
                tensor = tensor[:, channels]
            slices.append((value.name, tensor))
    return slices


def _stored_params(ffn: FeedForwardOps, op: Op, biased: bool) -> tuple[Value, ...]:
    if op.name != LINEAR:
        return ()
    return op.inputs[1:2] if op is ffn.down and not biased else op.inputs[1:]
