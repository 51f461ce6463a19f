"""Routers that read no hidden state are hoisted out of their layers, into a separate function.

    h = …                                        logits = aten.linear(aten.embedding(e, ids), r)
    logits = aten.linear(aten.embedding(e, ids), r)   w, i = moe.route(logits)
    w, i = moe.route(logits)                ->   h = …
    … = moe.dispatch(h, i)                       … = moe.dispatch(h, i)

A caller can ask for the experts of every layer before the first layer runs (Read-ME, arXiv
2410.19123), and reuse choices that depend on a prompt or a timestep while these stay the same
(RAPHAEL, arXiv 2305.18295): `split` returns `route(ids) -> w, i` and `routed(…, w, i)`.
Exact: ops are moved, not changed. Values that several routers read are computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.sizes.dims import symbols
from moec.ir.traits import PRODUCTS
from moec.passes.core.moe_layer import name_of
from moec.passes.core.rewrite import drop_dead, sizes_in
from moec.passes.core.runner import Log, Pass

_HIDDEN = frozenset({*PRODUCTS, "aten.convolution.default", "aten.layer_norm.default"})


@dataclass(frozen=True)
class HoistRouters(Pass):
    """Evaluate routers that read no hidden state before all layers, as a separate function."""

    name: ClassVar[str] = "hoist-routers"
    source: ClassVar[str] = "Read-ME, arXiv 2410.19123; RAPHAEL, arXiv 2305.18295"

    def run(self, program: Program, log: Log) -> Program:
        graph = program.graph
        first: set[Op] = set()
        chosen = _router_results(graph)
        for choice in _choices(graph):
            try:
                cone = _router_ops(graph, choice, chosen)
            except NoMatch as why:
                log.decline(choice.layer, str(why))
                continue
            reads = ", ".join(v.name for v in graph.inputs if v in _leaves(cone)) or "weights"
            if log.spend(f"router of {choice.layer}"):
                first |= cone
                log.says.append(f"{choice.layer}: its experts depend on {reads} only")
        order = sorted(graph.ops, key=lambda op: op not in first)
        return replace(program, graph=replace(graph, ops=tuple(order)))


@dataclass(frozen=True)
class RouterResult:
    """The results of a layer's router, and the value [T, D] or [R, D] that its experts read."""

    layer: str
    experts: Value
    weights: Value | None
    x: Value


@dataclass(frozen=True)
class Hoisted:
    """`route` computes the choices of layers from some of the inputs. `routed` takes all inputs,
    then the outputs of `route`, and returns the results of the model. Where routers read different
    inputs, `parts` divides `route` by the inputs read: choices that depend on a prompt are then
    computed once per prompt, choices that depend on a timestep once per step."""

    route: Program
    routed: Program
    choices: tuple[RouterResult, ...]
    parts: tuple[Program, ...] = ()


def split(program: Program) -> Hoisted | None:
    """The two functions of a program whose routers are hoisted; None if no router can be."""
    graph = program.graph
    choices, chosen = [], _router_results(graph)
    route, parts = Cones(), dict[tuple[Value, ...], Cones]()
    for choice in _choices(graph):
        try:
            ops = _router_ops(graph, choice, chosen)
        except NoMatch:
            continue
        weights = choice.weights
        if weights is not None and weights not in graph.params:
            try:
                ops |= _router_ops(graph, replace(choice, experts=weights), chosen)
            except NoMatch:
                weights = None
        choices.append(replace(choice, weights=weights))
        both = (choice.experts,) if weights is None else (choice.experts, weights)
        outputs = [v for v in both if v in graph.producers]
        route = route.joined(ops, outputs)
        reads = _read(graph, ops, outputs)
        parts[reads] = parts.get(reads, Cones()).joined(ops, outputs)
    if not choices:
        return None
    outputs = list(route.outputs)
    rest = tuple(op for op in graph.ops if not set(op.outputs) & set(outputs))
    states = {state.before for state in graph.states}
    inputs = [v for v in graph.inputs if v not in states]
    routed = replace(graph, inputs=(*inputs, *outputs, *(v for v in graph.inputs if v in states)),
                     ops=rest, name="routed")  # fmt: skip
    separate = parts.values() if len(parts) > 1 else ()
    return Hoisted(
        _with_weights(route.graph(graph), program),
        _with_weights(routed, program),
        tuple(choices),
        tuple(_with_weights(part.graph(graph), program) for part in separate),
    )


@dataclass(frozen=True)
class Cones:
    """The ops that some routers depend on, and the routers' results."""

    ops: frozenset[Op] = frozenset()
    outputs: tuple[Value, ...] = ()

    def joined(self, ops: Set[Op], outputs: Iterable[Value]) -> Cones:
        return Cones(self.ops | ops, tuple(dict.fromkeys((*self.outputs, *outputs))))

    def graph(self, program: Graph) -> Graph:
        inputs = _read(program, self.ops, self.outputs)
        ops = tuple(op for op in program.ops if op in self.ops)
        return Graph(inputs, program.params, ops, self.outputs, (), program.bounds, "route")


def _read(graph: Graph, ops: Set[Op], outputs: Iterable[Value]) -> tuple[Value, ...]:
    """The inputs that `ops` read, and inputs that determine the sizes of `outputs`, in order."""
    needed = _leaves(ops) | set(_size_inputs(graph, outputs, _leaves(ops)))
    return tuple(value for value in graph.inputs if value in needed)


def _with_weights(graph: Graph, program: Program) -> Program:
    live = drop_dead(graph)
    stored = (*live.params, *(state.before for state in live.states))
    return Program(live, {value.name: program.weights[value.name] for value in stored})


def _choices(graph: Graph) -> Iterator[RouterResult]:
    """The choices by which each layer's rows are sorted. Layers may share a sort."""
    for op in graph.ops:
        if op.name == "moe.sort":
            experts, orders, ends = op.inputs[0], op.outputs[:2], op.outputs[2]
            starts = [r for r in graph.readers.get(ends, ()) if r.attrs.get("gather")]
        elif op.name == "moe.dispatch" and not op.attrs.get("sorted"):
            experts, orders, starts = op.inputs[1], op.outputs[1:2], [op]
        else:
            continue
        for combine in (r for order in orders for r in graph.readers.get(order, ())):
            if combine.name != "moe.combine" or not starts:
                continue
            weights = combine.inputs[2] if combine.attrs.get("weighted") else None
            matching = [r for r in starts if name_of(r) == combine.origin] or starts
            yield RouterResult(name_of(combine), experts, weights, matching[0].inputs[0])


def _router_results(graph: Graph) -> set[Value]:
    """All results of routers."""
    both = (v for choice in _choices(graph) for v in (choice.experts, choice.weights))
    return {value for value in both if value is not None}


def _router_ops(graph: Graph, choice: RouterResult, chosen: set[Value]) -> set[Op]:
    """The ops that a layer's choices depend on. Raises NoMatch if one of them is an op of a layer.

    The inputs of a layer's rows are followed back up to `chosen`, the results of routers.
    """
    cone, rows = _cone(graph, choice.experts), _cone(graph, choice.x, chosen)
    for op in graph.ops:
        if op in cone and op.name.startswith(("grouped.", "moe.experts", "moe.combine")):
            raise NoMatch(f"its router reads outputs of the experts of {name_of(op)}")
    if not cone:
        raise NoMatch("its choices are an input or a weight, so it has no router")
    if (_leaves(rows) - _leaves(cone)) & set(graph.inputs):
        return cone  # the rows depend on more than the router does
    for op in graph.ops:
        if op in cone and op in rows and _is_hidden(op):
            raise NoMatch(f"its router reads hidden states: {op} also feeds the experts")
    return cone


def _is_hidden(op: Op) -> bool:
    return op.name.startswith("nn.") or op.name in _HIDDEN


def _cone(graph: Graph, value: Value, stop: Set[Value] = frozenset()) -> set[Op]:
    """The ops that a value depends on, not through `stop`, with the ops that read its sizes."""
    sizes = {op.attrs["name"]: op for op in graph.ops if op.name == "moec.size"}
    ops: set[Op] = set()
    waiting = [graph.producers[value]] if value in graph.producers else []
    while waiting:
        op = waiting.pop()
        if op in ops:
            continue
        ops.add(op)
        waiting += [graph.producers[v] for v in op.inputs if v in graph.producers and v not in stop]
        waiting += [sizes[name] for name in sizes_in(op) if name in sizes] if sizes else []
    return ops


def _leaves(ops: Iterable[Op]) -> set[Value]:
    return {value for op in ops for value in op.inputs}


def _size_inputs(graph: Graph, outputs: Iterable[Value], inputs: set[Value]) -> Iterator[Value]:
    """The inputs that determine those sizes of `outputs` that `inputs` do not determine."""
    determined = {str(dim) for value in graph.inputs if value in inputs for dim in value.shape}
    for value in outputs:
        for name in sorted({n for dim in value.shape for n in symbols(dim)} - determined):
            source = next((v for v in graph.inputs if name in map(str, v.shape)), None)
            if source is not None:
                determined |= set(map(str, source.shape))
                yield source
