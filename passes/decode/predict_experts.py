"""Each layer of experts says which ones the next layer is expected to choose.

    t, y = nn.add_norm(h, a, n0)                     t, y = nn.add_norm(h, a, n0)
    w, i = moe.gate(y, r0)                           w, i = moe.gate(y, r0)
    … = moe.sort(i)                                  _, g = moe.gate(nn.rms_norm(t, n1), r1)
    …                                           ->   … = moe.sort(i, g)
    u, z = nn.add_norm(…, b, n1)                     …
    v, j = moe.gate(z, r1)                           v, j = moe.gate(z, r1)
    … = moe.sort(j)                                  … = moe.sort(j)

The next layer's router runs on the residual stream as it is before this layer's experts. Where
experts are on disk, the store reads those of the guess that are absent while this layer computes;
functions without a store do not compute it. Exact: no result depends on a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, Stage, Value
from moec.passes.core.moe_layer import name_of
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass

_NORMS = ("nn.add_norm", "nn.rms_norm", "aten.layer_norm.default")
_LAYERS = ("grouped.", "nn.", "moe.combine", "moe.experts")
_MOVES = ("aten.reshape.default", "aten.index_select.default")


@dataclass(frozen=True)
class PredictExperts(Pass):
    """Guess the next layer's experts, for a store that reads them early."""

    name: ClassVar[str] = "predict-experts"
    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.GROUPED

    def run(self, program: Program, log: Log) -> Program:
        sorts = [op for op in program.graph.ops if op.name == "moe.sort"]
        following = dict(zip((op.outputs for op in sorts), sorts[1:], strict=False))

        def rule(op: Op, b: Builder) -> Sequence[Value] | None:
            after = following.get(op.outputs)
            return None if after is None else predict(op, after, b)

        return Program(rewrite(program.graph, rule, log), program.weights)


@dataclass(frozen=True)
class _Router:
    """The norm whose result a router reads, and the ops from there to its choices, in order."""

    norm: Op
    ops: tuple[Op, ...]


def predict(op: Op, following: Op, b: Builder) -> Sequence[Value]:
    """The results of the sort `op` with a guess of the choices that `following` sorts.

    Raises NoMatch unless both routers read norms of one residual stream, and nothing else.
    """
    before, after = _router(op, b.graph).norm, _router(following, b.graph)
    stream = before.outputs[0] if before.name == "nn.add_norm" else before.inputs[0]
    new = {after.norm.outputs[-1]: _normalised(stream, after.norm, b)}
    for router_op in after.ops:
        new |= zip(router_op.outputs, _copied(router_op, new, b), strict=True)
    guess = new[following.inputs[0]]
    return b.emit(op.name, (op.inputs[0], guess), like=op, attrs=op.attrs,
                  named=[value.name for value in op.outputs])  # fmt: skip


def _router(sort: Op, graph: Graph) -> _Router:
    layer, ops, norms = name_of(sort), set[Op](), set[Op]()
    waiting = [sort.inputs[0]]
    while waiting:
        value = waiting.pop()
        op = graph.producers.get(value)
        if op is None and value not in graph.params:
            raise NoMatch(f"the router of {layer} reads {value.name}, an input of the model")
        if op is None or op in ops:
            continue
        if op.name in _NORMS and value is op.outputs[-1]:
            norms.add(op)
        elif op.name.startswith(_LAYERS):
            raise NoMatch(f"the router of {layer} reads {value.name}, of {op.name}, without a norm")
        else:
            ops.add(op)
            waiting += op.inputs
    if len(norms) != 1:
        raise NoMatch(f"the router of {layer} reads {len(norms)} norms, and not one")
    return _Router(norms.pop(), tuple(op for op in graph.ops if op in ops))


def _normalised(stream: Value, norm: Op, b: Builder) -> Value:
    """The norm of another layer, of the rows of the stream that it is applied to there."""
    moves = _moves(stream, norm, b)
    for move in moves:
        (stream,) = _copied(move, {move.inputs[0]: stream}, b)
    if norm.name != "nn.add_norm":
        return _copied(norm, {norm.inputs[0]: stream}, b)[0]
    if norm.attrs["kind"] != "rms":
        raise NoMatch(f"{norm.outputs[-1].name} is a layer norm with a fused sum")
    attrs = {name: norm.attrs[name] for name in ("epsilon", "round_first") if name in norm.attrs}
    inputs = (stream, *norm.inputs[2:])
    return b.emit("nn.rms_norm", inputs, like=norm, attrs=attrs, named=norm.outputs[1].name)[0]


def _moves(stream: Value, norm: Op, b: Builder) -> list[Op]:
    """The ops that bring a stream of this type into the form in which `norm` adds or reads it."""
    for value in norm.inputs[:2] if norm.name == "nn.add_norm" else norm.inputs[:1]:
        moves: list[Op] = []
        while value.type != stream.type:
            op = b.graph.producers.get(value)
            if op is None or op.name not in _MOVES:
                break
            moves.insert(0, op)
            value = op.inputs[0]
        else:
            return moves
    reads, has = norm.inputs[0], stream
    raise NoMatch(f"{reads.name} is {reads.type}, and the layer before has {has.name}, {has.type}")


def _copied(op: Op, new: Mapping[Value, Value], b: Builder) -> tuple[Value, ...]:
    inputs = tuple(new.get(value, value) for value in op.inputs)
    for value in inputs:
        if value in b.graph.producers and value not in b.producers:
            raise NoMatch(f"{value.name} is computed after the layer before")
    outputs = tuple(replace(value, name=b.fresh(value.name)) for value in op.outputs)
    return b.append(replace(op, inputs=inputs, outputs=outputs))
