"""Form 9: experts of one neuron each, rows of two tables (PEER, arXiv 2407.04153; doge).

    h = act(einsum("td,tkd->tk", x, inward[ids])) * weights
    y = einsum("tk,tkd->td", h, outward[ids])

becomes one moe.neurons. The region begins at the ids and the weights, however they were chosen
(product keys choose the largest sums of two scores). The choices of several heads are concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.ir.traits import CASTS, PRODUCTS, VIEWS, is_elementwise
from moec.passes.core.runner import Log
from moec.passes.proof.input_generators import Ids
from moec.passes.proof.prove import Prover
from moec.passes.recognise.reading.body import ROWS
from moec.passes.recognise.reading.layout import divide
from moec.passes.recognise.reading.opnames import PICKS
from moec.passes.recognise.region import (
    RegionEmitter,
    Scope,
    chooses,
    replaced,
    replacement,
)
from moec.passes.recognise.routers.expert_ids import Outside

_MOVES = VIEWS | CASTS | {"aten.permute.default", "aten.expand.default"}
_SUMS = (*PRODUCTS, "aten.mul.Tensor", "aten.sum.dim_IntList")
_FARTHEST = 24  # ops between a table and the sum over its rows


@dataclass(frozen=True)
class Neurons:
    """`x` is [.., D]; `ids` and `weights` hold k choices per token; `functions` are applied to the
    inner products."""

    output: Value
    x: Value
    ids: Value
    weights: Value
    inward: Value
    outward: Value
    functions: tuple[Op, ...]
    outside: Outside

    @property
    def shape(self) -> tuple[Dim, Dim]:
        """[T, k]."""
        tokens = product(self.x.shape[:-1])
        k = divide(product(self.ids.shape), tokens)
        if not isinstance(k, int):
            raise NoMatch(
                f"{self.ids} does not have the same number of choices for each of {tokens} tokens"
            )
        return tokens, k


def recognise_neurons(program: Program, prover: Prover, log: Log) -> Program:
    """The program with experts of one neuron as nodes; the reason for each refusal is logged."""
    scope = Scope(program.graph, program.weights)
    nodes: dict[Op, Neurons] = {}
    for inward, outward in tables(scope):
        where = inward.origin or inward.outputs[0].name
        try:
            node = proved(scope, inward, outward, prover)
        except NoMatch as why:
            log.decline(where, f"experts of one neuron: {why}")
            continue
        if log.spend(f"neurons {node.output}"):
            nodes[scope.graph.producers[node.output]] = node
    emits = {op: partial(emit, node) for op, node in nodes.items()}
    return replace(program, graph=replaced(scope.graph, emits))


def tables(scope: Scope) -> Iterator[tuple[Op, Op]]:
    """Gathers from two tables [E, ..] by the same ids, where the rows of the second are scaled by
    values computed from the first."""
    picks = [
        op
        for op in scope.graph.ops
        if op.name in PICKS
        and len(op.inputs) == 2
        and op.inputs[0] in scope.constants
        and op.inputs[0].dtype in FLOATS
        and len(op.inputs[0].shape) == 2
        and chooses(scope, op.inputs[1])
    ]
    for inward in picks:
        for outward in picks:
            same = scope.source_of(inward.inputs[1]) is scope.source_of(outward.inputs[1])
            if inward is outward or not same:
                continue
            if inward.inputs[0].shape[0] != outward.inputs[0].shape[0]:
                continue
            scaled = sums_of(scope, outward.outputs[0])
            others = [v for _, operands in scaled for v in operands]
            if inward in scope.upstream(others) and _meets_rows(scope, inward):
                yield inward, outward


def _meets_rows(scope: Scope, gather: Op) -> bool:
    """Whether a gathered row is multiplied by a value of the same width; a wider row is a
    matrix."""
    width = gather.inputs[0].shape[1:]
    sums = sums_of(scope, gather.outputs[0])
    return any(
        scope.source_of(v, _MOVES).shape[-1:] == width for _, operands in sums for v in operands
    )


def sums_of(scope: Scope, value: Value) -> list[tuple[Value, tuple[Value, ...]]]:
    """The sums of products that gathered rows end in, each with the other operands so far."""
    results: list[tuple[Value, tuple[Value, ...]]] = []
    waiting: list[tuple[Value, tuple[Value, ...]]] = [(value, ())]
    while waiting and len(results) < _FARTHEST:
        current, operands = waiting.pop(0)
        for op in scope.graph.readers.get(current, ()):
            if op.name not in _MOVES and op.name not in _SUMS:
                continue
            others = tuple(v for v in op.inputs if v is not current)
            results.append((op.outputs[0], (*operands, *others)))
            waiting.append(results[-1])
    return results


def proved(scope: Scope, inward: Op, outward: Op, prover: Prover) -> Neurons:
    """Raises NoMatch unless a node gives the same results as the ops between the gathers."""
    reason = "its rows are not multiplied by tokens, weighted and summed"
    for node in proposals(scope, inward, outward):
        experts = inward.inputs[0].shape[0]
        try:
            _, k = node.shape
            cut = tuple(dict.fromkeys((node.x, node.ids, node.weights)))
            at = scope.graph.producers[node.output]
            region = scope.cut([node.output], cut)
            after = replacement(scope, at, cut, partial(emit, node))
            last = node.ids.shape[-1]
            slots = min(n for n in (last, k, experts) if isinstance(n, int))
            feed = Ids(int(str(experts)), slots, least=node.outside.least)
            prover.prove(region, after, {node.ids: feed})
            return node
        except NoMatch as why:
            reason = str(why)
    raise NoMatch(reason)


def proposals(scope: Scope, inward: Op, outward: Op) -> Iterator[Neurons]:
    ids = scope.source_of(inward.inputs[1])
    down, up = inward.inputs[0], outward.inputs[0]
    read = [inward.inputs[1], outward.inputs[1]]
    outside = Outside.of(scope, [ids], read, int(str(down.shape[0])))
    for sums, operands in sums_of(scope, inward.outputs[0]):
        if product(sums.shape) != product(ids.shape) or len(operands) != 1:
            continue
        x = scope.source_of(operands[0], _MOVES)
        if x.shape[-1:] != down.shape[1:] or x.dtype not in FLOATS:
            continue
        functions, active = applied(scope, sums)
        for reader in scope.graph.readers.get(active, ()):
            weights = [v for v in reader.inputs if v is not active]
            if reader.name != "aten.mul.Tensor" or len(weights) != 1:
                continue
            if product(weights[0].shape) != product(ids.shape):
                continue
            for y, _ in sums_of(scope, outward.outputs[0]):
                if product(y.shape) == product((*x.shape[:-1], up.shape[1])):
                    yield Neurons(y, x, ids, weights[0], down, up, functions, outside)
        return


def applied(scope: Scope, value: Value) -> tuple[tuple[Op, ...], Value]:
    """The element-wise functions of one operand that follow `value`, and their result."""
    functions: list[Op] = []
    while True:
        readers = scope.graph.readers.get(value, ())
        if len(readers) != 1 or len(readers[0].inputs) != 1:
            return tuple(functions), value
        (op,) = readers
        moves = op.name in _MOVES - CASTS
        if not moves and not is_elementwise(op.name):
            return tuple(functions), value
        if not moves:
            functions.append(op)
        value = op.outputs[0]


def body_of(functions: tuple[Op, ...], dtype: str) -> Graph:
    """The functions as a body on inner products [R]."""
    sums = value = Value("sums", TensorType(dtype, (ROWS,)))
    ops = []
    for number, op in enumerate(functions):
        output = Value(f"h{number}", TensorType(op.outputs[0].dtype, (ROWS,)))
        ops.append(Op(op.name, (value,), (output,), op.attrs))
        value = output
    return Graph((sums,), (), tuple(ops), (value,), name="body")


def emit(node: Neurons, emit: RegionEmitter) -> Value:
    shape = node.shape
    x = emit.rows(emit.old(node.x))
    ids = emit.reshape(node.outside.named(emit, emit.old(node.ids)), shape)
    weights = emit.reshape(emit.old(node.weights), shape)
    tables = [emit.old(node.inward), emit.old(node.outward)]
    body = body_of(node.functions, x.dtype)
    (y,) = emit("moe.neurons", [x, ids, weights, *tables], body=body, named=node.output.name)
    return emit.reshape(y, node.output.shape)
