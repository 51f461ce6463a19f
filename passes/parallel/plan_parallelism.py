"""The graph of one rank of a plan: the rank holds some of the experts, and rows are sent to them.

    rows, order, ends = moe.dispatch(x, ids)      slots = dist.assign(ids, first, holders)
    out = moe.experts(rows, ends, w1, …)          rows, order, ends = moe.dispatch(x, slots)
                                                  send = dist.counts(ends)
                                           ->     receive = dist.all_to_all(send) <group="ep">
                                                  got = dist.all_to_all(rows, send, receive)
                                                  mine, o, e = moe.dispatch(got, slot of each row)
                                                  out = moe.experts(mine, e, w1[this rank], …)
                                                  back = moe.combine(out, o)
                                                  out = dist.all_to_all(back, receive, send)

Counts are exchanged before rows, and give the number of rows that each rank receives. Every rank
has its own tokens (data parallelism). The outputs of all ranks together are those of the model on
all tokens, up to the rounding of products with other numbers of rows; a capacity is applied to the
tokens of all ranks together. A staged exchange goes through the node first, then along the rail; a
deduplicated one sends a token along the rail to each node once, then to its experts there. For
sliced experts, rows are gathered, and the sums are scattered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

import sympy
import torch

from moec.errors import NoMatch, SetupError, UnsupportedError, UsageError
from moec.ir.graph import Attr, Graph, Module, Op, Program, Stage, TensorType, Value
from moec.ir.opdef import OPS
from moec.ir.sizes.dims import Bounds, Dim, canonical, symbol, symbols
from moec.ir.traits import PRODUCTS
from moec.passes.core.moe_layer import MOVES, Splice, name_of
from moec.passes.core.options import option, validate
from moec.passes.core.runner import Log, Pass
from moec.passes.parallel.cut_attention import cut_attention
from moec.passes.parallel.exchange_rows import Exchanged, slots_of
from moec.passes.parallel.slice_experts import slice_body
from moec.plan.groups import WORLD, near
from moec.plan.plan import LayerPlan, Plan, read_plan


@dataclass(frozen=True)
class PlanParallelism(Pass):
    """Make the graph of one rank of a plan: its experts, and the exchange of rows."""

    plan: str = option("", "the plan, a file written by moec plan -o")
    rank: int = option(0, "which rank", low=0)

    name: ClassVar[str] = "plan-parallelism"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE
    source: ClassVar[str] = "DeepSpeed-MoE, arXiv 2201.05596; SE-MoE, arXiv 2205.10034; EPLB"

    def __post_init__(self) -> None:
        validate(self)

    def run(self, program: Program, log: Log) -> Program:
        return parallelise(program, read_plan(Path(self.plan)), self.rank, log)


def rank_programs(
    program: Program, plan: Plan, log: Log | None = None, function: str = "main"
) -> Module:
    """`rank.N.main`, or another function, for every rank of the plan. Raises UsageError if the plan
    is for another model."""
    return Module(
        {
            f"rank.{rank}.{function}": parallelise(program, plan, rank, log or Log())
            for rank in range(plan.devices)
        }
    )


def parallelise(program: Program, plan: Plan, rank: int, log: Log) -> Program:
    """The program of one rank. A layer that cannot be split as planned is computed in full on every
    rank, and the log has the reason. Raises UsageError if the plan is for another model, and
    UnsupportedError for a capacity that cannot be applied to the tokens of all ranks."""
    if rank >= plan.devices:
        raise UsageError(f"rank {rank}: the plan is for {plan.devices} devices")
    program = cut_attention(program, plan, rank, log)
    splice = Splice(program)
    bounds = {**program.graph.bounds, **gather_choices(splice, plan.devices)}
    for number, (experts, layer) in enumerate(_pairs(program.graph, plan)):
        where = name_of(experts)
        try:
            slices = (
                None if layer.slices == 1 else slice_body(cast(Graph, experts.body), layer.slices)
            )
            dispatch = _dispatch(program.graph, experts)
            once = layer.form == "deduplicated"
            combine = combine_of(program.graph, experts, dispatch) if once else None
        except NoMatch as why:
            log.decline(where, str(why))
            continue
        if layer.ranks * layer.slices == 1 or not log.spend(f"layer {layer.layer} of {where}"):
            continue
        layer_of_rank = (splice, plan, layer, rank, number, experts, dispatch, slices)
        if combine is None:
            bounds |= Exchanged(*layer_of_rank).build()
        else:
            bounds |= SentOnce(*layer_of_rank).build_with(combine)
    result = splice.done()
    return replace(result, graph=replace(result.graph, bounds=bounds))


def _pairs(graph: Graph, plan: Plan) -> Iterator[tuple[Op, LayerPlan]]:
    ops = [op for op in graph.ops if op.name == "moe.experts"]
    layers = [layer for layer in plan.layers if layer.experts]
    counts = [op.inputs[2].shape[0] for op in ops]
    if counts != [layer.experts for layer in layers]:
        raise SetupError(
            f"the plan of {plan.model} is for {len(layers)} MoE layers with "
            f"{[layer.experts for layer in layers][:4]}… experts, this model has {len(ops)} with "
            f"{counts[:4]}…"
        )
    yield from zip(ops, layers, strict=True)


def _dispatch(graph: Graph, experts: Op) -> Op:
    dispatch = graph.producers[experts.inputs[1]]
    if dispatch.name != "moe.dispatch":
        raise NoMatch(f"the rows come from {dispatch.name}, not from a dispatch")
    return dispatch


def combine_of(graph: Graph, experts: Op, dispatch: Op) -> Op:
    """The sum over each token's experts. Raises NoMatch if another op reads their rows, or if an op
    other than the experts reads what is dispatched."""
    readers = graph.readers.get(experts.outputs[0], ())
    if [op.name for op in readers] != ["moe.combine"] or experts.outputs[0] in graph.results:
        raise NoMatch("a deduplicated exchange needs a moe.combine that alone reads the experts")
    (combine,) = readers
    for value in dispatch.outputs:
        other = [op for op in graph.readers.get(value, ()) if op not in (experts, combine)]
        if other or value in graph.results:
            what = other[0].name if other else "an output of the model"
            raise NoMatch(f"{value.name}, whose rows are deduplicated, is also read by {what}")
    return combine


class SentOnce(Exchanged):
    """Emits the ops of rank `rank` in place of dispatch, experts and combine."""

    def build_with(self, combine: Op) -> dict[str, Bounds]:
        """Replaces the layer up to `combine`. Returns the bounds of the sizes that are read from
        counts."""
        here = near(self.layer, self.plan.node_size)
        x, ids, *scales = self.dispatch.inputs
        weights = combine.inputs[2:3] if combine.attrs.get("weighted") else ()
        first, holders = slots_of(self.layer, self.order)
        tables = self._table("first", first), self._table("holders", holders)
        slots = self._op("dist.assign", (ids, *tables))
        nodes = self.layer.ranks // here
        node = [rank // here for rank, held in enumerate(self.layer.slots) for _ in held]
        node_of_slot = self._look_up("node", torch.tensor([*node, nodes]), slots)
        once = self._op("dist.first_of", (node_of_slot,), other=nodes)
        rows, order, ends = self._sorted(x, once, nodes)
        across = self._way("rail", ends, (1,) * nodes, rows.shape[0])
        received = self._sent(across, rows)
        slots = self._sent(across, self._sorted(slots, once, nodes)[0])
        scales = [self._sent(across, self._sorted(v, once, nodes)[0]) for v in scales]
        weights = tuple(self._sent(across, self._sorted(v, once, nodes)[0]) for v in weights)
        result = self._inside(received, slots, tuple(scales), here)
        part = self._combined(combine, (*result, *weights), tokens=received.shape[0], added=False)
        back = self._back(across, part)
        addends = combine.inputs[2 + len(weights) :]
        self._combined(combine, (back, order, *addends), weighted=False)
        self.ops[-1] = replace(self.ops[-1], outputs=combine.outputs)
        self.splice.put(self.dispatch, [])
        self.splice.put(self.experts, [])
        self.splice.put(combine, self.ops)
        return self.bounds

    def _inside(
        self, rows: Value, slots: Value, scales: tuple[Value, ...], here: int
    ) -> tuple[Value, Value]:
        """The results of this node's experts for rows [M, D] with slots [M, k], by rank of the
        node, and their order."""
        this = self.position // here
        ranks = [
            rank % here if rank // here == this else here
            for rank, held in enumerate(self.layer.slots)
            for _ in held
        ]
        target = self._look_up("local_rank", torch.tensor([*ranks, here]), slots)
        by_rank, order, ends = self._sorted(rows, target, here, scales)
        count = slots.shape[0] * slots.shape[1]
        local = self._look_up("slot", self._local_slots(), slots)
        column, key = self._shaped(local, count, 1), self._shaped(target, count, 1)
        sorted_slots = self._flat(self._sorted(column, key, here)[0])
        inside = self._way("node", ends, (1,) * here, by_rank.shape[0])
        arrived = self._sent(inside, by_rank)
        result = self._computed(arrived, self._sent(inside, sorted_slots))
        return self._back(inside, result), order

    def _look_up(self, name: str, table: torch.Tensor, slots: Value) -> Value:
        """table[slots]: i64[T, k]."""
        flat = self._shaped(slots, slots.shape[0] * slots.shape[1])
        return self._shaped(self._looked_up(name, table, flat), *slots.shape)

    def _combined(self, combine: Op, inputs: tuple[Value, ...], **attrs: object) -> Value:
        draft = replace(combine, inputs=inputs, outputs=(), attrs={**combine.attrs, **attrs})
        (type,) = OPS["moe.combine"].infer(draft)
        output = self.splice.value(combine.outputs[0].name, type)
        self.ops.append(replace(draft, outputs=(output,)))
        return output


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
