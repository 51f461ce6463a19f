"""Blocks that share their experts become one block over the rows of all of them.

    w1, i1 = moe.route(aten.linear(x1, g))     x = cat(x1, x2)
    r1, o1, e1 = moe.dispatch(x1, i1)          w, i = moe.route(aten.linear(x, g))
    y1 = moe.combine(moe.experts(r1, …), w1)   r, o, e = moe.dispatch(x, i)
    w2, i2 = moe.route(aten.linear(x2, g)) ->  y = moe.combine(moe.experts(r, …), o, w)
    r2, o2, e2 = moe.dispatch(x2, i2)          y1 = y[: T1]; y2 = y[T1 :]
    y2 = moe.combine(moe.experts(r2, …), w2)

The experts of a module that is called twice, for two objectives (M3-JEPA, arXiv 2409.05929) or two
views, are read once instead of twice, in products of twice the rows. Blocks stay separate where one
depends on the result of another, and where experts have a capacity, which limits each call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar, cast

from moec.ir.canonical import without_origins
from moec.ir.graph import Attr, Graph, Op, Program, Ref, Stage, TensorType, Value
from moec.ir.sizes.dims import Dim
from moec.ir.text import print_graph, show_attr
from moec.passes.core.moe_layer import name_of
from moec.passes.core.rewrite import Builder, rebuild, sizes_in
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class JoinCalls(Pass):
    """Run blocks that share their experts as one block, over the rows of all."""

    name: ClassVar[str] = "join-calls"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        graph = program.graph
        families: dict[tuple[object, ...], list[ExpertCall]] = {}
        for op in graph.ops:
            if op.name == "moe.experts":
                call = call_of(graph, op)
                if call is not None:
                    families.setdefault(call.key(graph), []).append(call)
        for calls in families.values():
            if len(calls) < 2:
                continue
            if any(depends_on(graph, call, later) for call, later in combinations(calls, 2)):
                log.decline(calls[0].name, "its experts are applied to their own outputs")
            elif log.spend(f"{len(calls)} calls of {calls[0].name}"):
                graph = join_calls(graph, calls)
        return replace(program, graph=graph)


@dataclass(frozen=True)
class ExpertCall:
    dispatch: Op
    experts: Op
    combine: Op

    @property
    def name(self) -> str:
        return name_of(self.experts)

    @property
    def tokens(self) -> Dim:
        return cast(Dim, self.combine.attrs["tokens"])

    @property
    def weights(self) -> Value | None:
        return self.combine.inputs[2] if self.combine.attrs.get("weighted") else None

    def key(self, graph: Graph) -> tuple[object, ...]:
        """Equal for calls that can be joined."""
        body = self.experts.body
        assert body is not None
        x, ids = self.dispatch.inputs
        weighted = None if self.weights is None else self.weights.dtype
        return (
            *(origin_of(graph, stack) for stack in self.experts.inputs[2:]),
            print_graph(without_origins(body)), self.dispatch.attrs["num_experts"],
            x.dtype, x.shape[1:], ids.dtype, ids.shape[1:], weighted,
            self.combine.attrs["k"], str(self.combine.attrs["dtype"]),
        )  # fmt: skip


def call_of(graph: Graph, experts: Op) -> ExpertCall | None:
    """The block of `experts`; None if ops outside it read its values, or it does more than
    dispatch, run the experts and combine."""
    dispatch = graph.producers[experts.inputs[1]]
    readers = graph.readers.get(experts.outputs[0], ())
    if dispatch.name != "moe.dispatch" or len(dispatch.inputs) > 2 or len(readers) != 1:
        return None
    parts = {experts, readers[0]}
    if any(set(graph.readers.get(value, ())) - parts for value in dispatch.outputs):
        return None
    limited = graph.producers.get(dispatch.inputs[1])
    plain = readers[0].name == "moe.combine" and not readers[0].attrs.get("added")
    plain = plain and readers[0].attrs["k"] == dispatch.inputs[1].shape[1]
    if not plain or (limited is not None and limited.name == "moe.capacity"):
        return None
    return ExpertCall(dispatch, experts, readers[0])


def origin_of(graph: Graph, value: Value) -> object:
    """A key that is equal for values computed by equal ops from the same weights."""
    op = graph.producers.get(value)
    if op is None:
        return value
    attrs = tuple((name, show_attr(attr)) for name, attr in sorted(op.attrs.items()))
    return (op.name, attrs, tuple(origin_of(graph, source) for source in op.inputs))


def depends_on(graph: Graph, first: ExpertCall, other: ExpertCall) -> bool:
    """Whether the input of `other` depends on the output of `first`."""
    waiting, reached = [first.combine.outputs[0]], set[Op]()
    while waiting:
        for reader in graph.readers.get(waiting.pop(), ()):
            if reader not in reached:
                reached.add(reader)
                waiting += reader.outputs
    return other.dispatch in reached


def join_calls(graph: Graph, calls: Sequence[ExpertCall]) -> Graph:
    builder = Builder(graph)
    builder.names |= {value.name for value in graph.values()}
    first = calls[0]
    x = _cat(builder, [call.dispatch.inputs[0] for call in calls], first.dispatch)
    ids, weights = _choices(builder, graph, calls, x)
    rows, order, ends = builder.emit(
        "moe.dispatch", [x, ids], like=first.dispatch, attrs=first.dispatch.attrs
    )
    (results,) = builder.emit(
        "moe.experts", [rows, ends, *first.experts.inputs[2:]], like=first.experts,
        attrs=first.experts.attrs, body=first.experts.body,
    )  # fmt: skip
    combined = [results, order]
    if weights is not None:
        combined.append(weights)
    attrs = {**first.combine.attrs, "tokens": x.shape[0]}
    (y,) = builder.emit("moe.combine", combined, like=first.combine, attrs=attrs)
    new: dict[Value, Value] = {}
    start: Dim = 0
    for call in calls:
        end = start + call.tokens
        old = call.combine.outputs[0]
        attrs = {"dim": 0, "start": start, "end": end}
        (new[old],) = builder.emit(
            "aten.slice.Tensor", [y], [old.type], like=call.combine, attrs=attrs
        )
        start = end
    replaced_ops = {op for call in calls for op in (call.dispatch, call.experts, call.combine)}
    rest = [
        replace(op, inputs=tuple(new.get(v, v) for v in op.inputs))
        for op in graph.ops
        if op not in replaced_ops
    ]
    return rebuild(graph, topological_order(graph, [*rest, *builder.ops]), new)


def _choices(
    builder: Builder, graph: Graph, calls: Sequence[ExpertCall], x: Value
) -> tuple[Value, Value | None]:
    """The expert ids and weights of all rows, by one router where the calls share it."""
    first = calls[0]
    routes = [graph.producers.get(call.dispatch.inputs[1]) for call in calls]
    route = routes[0]
    if route is not None and all(
        _routes_as(route, other, call) for other, call in zip(routes, calls, strict=True)
    ):
        logits = [cast(Op, other).inputs[0] for other in routes]
        linears = [graph.producers.get(value) for value in logits]
        linear = linears[0]
        if linear is not None and all(
            op is not None
            and op.name == "aten.linear.default"
            and op.inputs == (call.dispatch.inputs[0], *linear.inputs[1:])
            for op, call in zip(linears, calls, strict=True)
        ):
            joint_type = TensorType(logits[0].dtype, (x.shape[0], *logits[0].shape[1:]))
            (joint,) = builder.emit(linear.name, [x, *linear.inputs[1:]], [joint_type], like=linear)
        else:
            joint = _cat(builder, logits, route)
        weights, ids = builder.emit(
            "moe.route", [joint, *route.inputs[1:]], like=route, attrs=route.attrs
        )
        return ids, None if first.weights is None else weights
    ids = _cat(builder, [call.dispatch.inputs[1] for call in calls], first.dispatch)
    if first.weights is None:
        return ids, None
    return ids, _cat(builder, [cast(Value, call.weights) for call in calls], first.combine)


def _routes_as(route: Op, other: Op | None, call: ExpertCall) -> bool:
    """Whether a call's router is `route`, applied to other logits."""
    return (
        other is not None
        and route.name == other.name == "moe.route"
        and other.inputs[1:] == route.inputs[1:]
        and other.attrs == route.attrs
        and call.dispatch.inputs[1] is other.outputs[1]
        and call.weights in (None, other.outputs[0])
    )


def _cat(builder: Builder, values: Sequence[Value], like: Op) -> Value:
    count = sum((value.shape[0] for value in values[1:]), values[0].shape[0])
    attrs: Mapping[str, Attr] = {"tensors": tuple(map(Ref, range(len(values))))}
    joint_type = TensorType(values[0].dtype, (count, *values[0].shape[1:]))
    return builder.emit("aten.cat.default", values, [joint_type], like=like, attrs=attrs)[0]


def topological_order(graph: Graph, ops: Sequence[Op]) -> list[Op]:
    """The ops in a stable topological order, which includes the sizes that they read from data."""
    makers = {value: op for op in ops for value in op.outputs}
    sizes = {op.attrs["name"]: op for op in ops if op.name == "moec.size"}
    ordered: dict[Op, None] = {}
    for root in ops:
        waiting = [root]
        while waiting:
            op = waiting[-1]
            needs = [makers[v] for v in op.inputs if v in makers]
            needs += [sizes[name] for name in sizes_in(op) if name in sizes] if sizes else []
            missing = [need for need in needs if need not in ordered and need is not op]
            if missing:
                waiting += missing
            else:
                ordered.setdefault(waiting.pop())
    return list(ordered)
