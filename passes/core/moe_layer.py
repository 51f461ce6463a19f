"""One MoE block of a graph in stage MOE, op by op, and how a pass replaces parts of it.

    weights, ids = moe.route(logits)             route
    ids = …                                      between: casts, moe.capacity
    rows, order, ends = moe.dispatch(x, ids)     dispatch
    out = moe.experts(rows, ends, w1, …)         experts
    y = moe.combine(out, order, weights)         combine

`Splice` keeps the identity of every value that it does not replace, so that the `Layer`s of a graph
stay valid while one of them is rewritten.

Where heads are experts (arXiv 2212.08066), two blocks take the same choices: the queries, whose
rows no weight multiplies, and the outputs. The outputs are the layer, the queries its companion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from moec.errors import NoMatch
from moec.ir.aten import IR_DTYPES
from moec.ir.graph import Attr, DType, Graph, Op, Program, TensorType, Value
from moec.ir.interpret.evaluate import run_graph, run_op
from moec.ir.ops.routing.routing import Routing, widened
from moec.ir.sizes.dims import symbols
from moec.ir.upcast import widen
from moec.passes.core.rewrite import Builder, drop_dead

MOVES = ("aten.reshape.default", "aten._to_copy.default", "aten.alias.default")


@dataclass(frozen=True, eq=False)
class Companion:
    """The experts of another block over a layer's choices, whose results have no weights."""

    between: tuple[Op, ...]
    dispatch: Op
    experts: Op


@dataclass(frozen=True, eq=False)
class Layer:
    """A block with a recognised router, whose choices only it and its `companions` read."""

    name: str
    route: Op
    between: tuple[Op, ...]
    dispatch: Op
    experts: Op
    combine: Op
    companions: tuple[Companion, ...] = ()

    @property
    def count(self) -> int:
        """How many experts there are."""
        return cast(int, self.dispatch.attrs["num_experts"])

    @property
    def routing(self) -> Routing:
        return Routing.of(self.route)

    @property
    def output(self) -> Value:
        return self.combine.outputs[0]

    @property
    def stacks(self) -> tuple[Value, ...]:
        """The experts' weights, [E, …] each."""
        return self.experts.inputs[2:]


def name_of(experts: Op) -> str:
    return experts.origin.removesuffix(".experts") or "(whole model)"


def layer_of(graph: Graph, experts: Op) -> Layer:
    """The block around a moe.experts. Raises NoMatch if an op is missing, an op outside the block
    reads its choices or rows, or the block is the companion of another."""
    dispatch = graph.producers[experts.inputs[1]]
    readers = graph.readers.get(experts.outputs[0], ())
    if [op.name for op in readers] != ["moe.combine"]:
        raise NoMatch("the rows of the experts are read by more than one moe.combine")
    between: list[Op] = []
    companions: list[Companion] = []
    value = dispatch.inputs[1]
    while True:
        others = [op for op in graph.readers[value] if op not in (*between, dispatch)]
        if any(op.name == "moe.zero_experts" for op in others):
            raise NoMatch("some experts of the router have no network (zero experts)")
        if readers[0].attrs.get("weighted"):
            by_reader = {op: companion_of(graph, op) for op in others}
            companions += [c for c in by_reader.values() if c is not None]
            others = [op for op in others if by_reader[op] is None]
        if others or value in graph.results:
            what = others[0].name if others else "an output of the model"
            raise NoMatch(f"the router's choices {value.name} are also read by {what}")
        source = graph.producers.get(value)
        if source is None or source.name not in (*MOVES, "moe.capacity", "moe.route"):
            raise NoMatch("the router is not recognised: its choices do not come from a top-k")
        if source.name == "moe.route":
            break
        between.insert(0, source)
        value = source.inputs[0]
    return Layer(
        name_of(experts),
        source,
        tuple(between),
        dispatch,
        experts,
        readers[0],
        tuple(companions),
    )


def companion_of(graph: Graph, op: Op) -> Companion | None:
    """The block that takes choices which `op` reads, if nothing else reads them there, and no
    weights multiply its results."""
    between: list[Op] = []
    while op.name in MOVES and len(graph.readers.get(op.outputs[0], ())) == 1:
        between.append(op)
        op = graph.readers[op.outputs[0]][0]
    experts = graph.readers.get(op.outputs[0], ()) if op.name == "moe.dispatch" else ()
    if len(op.inputs) != 2 or [reader.name for reader in experts] != ["moe.experts"]:
        return None
    readers = graph.readers.get(experts[0].outputs[0], ())
    plain = [reader.attrs.get("weighted", False) for reader in readers] == [False]
    return Companion(tuple(between), op, experts[0]) if plain else None


def constant(program: Program, value: Value) -> torch.Tensor:
    """A value that depends on weights alone. Raises NoMatch for one that depends on inputs."""
    graph = program.graph
    if value.name in program.weights and value in graph.params:
        return program.weights[value.name]
    op = graph.producers.get(value)
    if op is None or any(symbols(dim) for v in op.outputs for dim in v.shape):
        raise NoMatch(f"{value.name} is computed from the inputs, not stored")
    results = run_op(op, [constant(program, v) for v in op.inputs], {})
    return results[op.outputs.index(value)]


def expert_outputs(
    layer: Layer, stacks: Mapping[Value, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """The result of each expert for the same rows x [N, D], in float32 (of float64 in float64):
    [E, N, D]. `stacks` maps the params of the body to tensors [E, …]."""
    assert layer.experts.body is not None
    body = widen(layer.experts.body)
    with torch.no_grad():
        results = [
            run_graph(body, [widened(x), *(widened(stack[e]) for stack in stacks.values())])[0]
            for e in range(layer.count)
        ]
    return torch.stack(results)


class Splice:
    """Replacements for some ops of a graph, with their new weights."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names = Builder(program.graph)
        self.replaced: dict[Op, list[Op]] = {}
        self.weights: dict[Value, torch.Tensor] = {}

    def weight(self, name: str, tensor: torch.Tensor) -> Value:
        """A new param that holds `tensor`."""
        shape = tuple(tensor.shape)
        value = Value(self.names.fresh(name), TensorType(IR_DTYPES[tensor.dtype], shape))
        self.weights[value] = tensor
        return value

    def value(self, name: str, type: TensorType) -> Value:
        return Value(self.names.fresh(name), type)

    def emit(
        self,
        ops: list[Op],
        name: str,
        inputs: Sequence[Value],
        type: TensorType,
        like: Op,
        **attrs: Attr,
    ) -> Value:
        """Append an op with one result to `ops`, with the origin of `like`."""
        value = self.value(like.outputs[0].name, type)
        ops.append(Op(name, tuple(inputs), (value,), attrs, None, like.origin))
        return value

    def cast(self, ops: list[Op], value: Value, dtype: str, like: Op) -> Value:
        """`value` cast to a dtype; `value` itself if it has that dtype."""
        if value.dtype == dtype:
            return value
        type = TensorType(dtype, value.shape)
        return self.emit(ops, "aten._to_copy.default", (value,), type, like, dtype=DType(dtype))

    def put(self, old: Op, new: Sequence[Op]) -> None:
        """Replaces `old` by `new`, which computes every output of `old` that is still read."""
        self.replaced[old] = list(new)

    def done(self) -> Program:
        """The next program, without dead ops and weights."""
        graph, weights = self.program.graph, self.program.weights
        ops = tuple(new for old in graph.ops for new in self.replaced.get(old, [old]))
        graph = drop_dead(replace(graph, ops=ops, params=(*graph.params, *self.weights)))
        new_weights = {value.name: tensor for value, tensor in self.weights.items()}
        initial = (state.before.name for state in graph.states if state.before.name in weights)
        names = (*(param.name for param in graph.params), *initial)
        return Program(
            graph, {n: new_weights[n] if n in new_weights else weights[n] for n in names}
        )


def replace_experts(splice: Splice, layer: Layer, stacks: Sequence[torch.Tensor]) -> None:
    """Replaces the layer's stacks of weights by `stacks`, [E', …] each. The caller replaces the
    router. Raises NoMatch for a layer with companions, whose experts would be others."""
    if layer.companions:
        other = layer.companions[0].dispatch
        raise NoMatch(f"the router's choices {other.inputs[1].name} are also read by {other.name}")
    _replace_stacks(splice, layer, stacks)


def select_experts(splice: Splice, layer: Layer, experts: Sequence[int]) -> None:
    """Leaves only `experts`, in that order, in the layer and its companions. The caller replaces
    the router."""
    index = torch.tensor(list(experts))
    blocks: tuple[Layer | Companion, ...] = (layer, *layer.companions)
    for block in blocks:
        stacks = [constant(splice.program, stack)[index] for stack in block.experts.inputs[2:]]
        _replace_stacks(splice, block, stacks)


def _replace_stacks(
    splice: Splice, block: Layer | Companion, stacks: Sequence[torch.Tensor]
) -> None:
    count = len(stacks[0])
    ends = splice.value(block.dispatch.outputs[2].name, TensorType("i32", (count,)))
    rows, order, _ = block.dispatch.outputs
    for op in block.between:
        splice.put(op, [_with_count(op, count)])
    dispatch = _with_count(block.dispatch, count)
    splice.put(block.dispatch, [replace(dispatch, outputs=(rows, order, ends))])
    old = block.experts.inputs[2:]
    params = [splice.weight(value.name, stack) for value, stack in zip(old, stacks, strict=True)]
    inputs = (block.experts.inputs[0], ends, *params)
    splice.put(block.experts, [replace(block.experts, inputs=inputs)])


def _with_count(op: Op, count: int) -> Op:
    count_attr = {"num_experts": count} if "num_experts" in op.attrs else {}
    return replace(op, attrs={**op.attrs, **count_attr})
