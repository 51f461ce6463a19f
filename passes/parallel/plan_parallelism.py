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

from moec.errors import NoMatch, UsageError
from moec.ir.graph import Graph, Module, Op, Program, Stage
from moec.passes.core.moe_layer import Splice, name_of
from moec.passes.core.options import option, validate
from moec.passes.core.runner import Log, Pass
from moec.passes.parallel.cut_attention import cut_attention
from moec.passes.parallel.exchange_rows import Exchanged
from moec.passes.parallel.gather_choices import gather_choices
from moec.passes.parallel.send_once import SentOnce, combine_of
from moec.passes.parallel.slice_experts import slice_body
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
        raise UsageError(
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
