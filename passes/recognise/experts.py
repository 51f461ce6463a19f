"""Experts in all their forms become moe.dispatch, moe.experts and moe.combine; soft mixtures become
moe.soft_mixture, and experts of one neuron become moe.neurons.

Each form proposes blocks at its anchors. A proposal is accepted only if the region and its
replacement agree on random inputs (moec.passes.proof.prove). Refused proposals are logged with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, Ref, Stage, Value
from moec.ir.text import parse
from moec.passes.core.rewrite import Builder, rebuild
from moec.passes.core.runner import Log, Pass
from moec.passes.proof.branch_coverage import missing_decisions
from moec.passes.proof.input_generators import Ids
from moec.passes.proof.prove import Prover
from moec.passes.recognise.forms.branches import levels
from moec.passes.recognise.forms.loops import loop
from moec.passes.recognise.forms.soft.soft_mixture import logits_of_slots, recognise_soft_mixtures
from moec.passes.recognise.forms.stacks import batched
from moec.passes.recognise.forms.stacks.neurons import recognise_neurons
from moec.passes.recognise.reading.block import Candidate, Proposal, emit_block, keep_value
from moec.passes.recognise.region import RegionEmitter, Scope, replacement
from moec.passes.recognise.routers.other_choices import RULE as OTHER_CHOICES
from moec.passes.recognise.routers.other_choices import other_choices, other_mixtures
from moec.passes.recognise.routers.routing import Unlike

# Form 1: the opaque op of a Hugging Face experts module.
#
#     y = moec.experts(x[T, D], ids[T, k], weights[T, k], stacks…) <num_experts, body>
#
# The op carries the body, so nothing has to be inferred. Ids of num_experts and more are no expert.


def opaque_candidates(scope: Scope) -> Iterator[Candidate]:
    for op in scope.graph.ops:
        if op.name == "moec.experts.default":
            yield Candidate(op, partial(propose_opaque, op))


def propose_opaque(op: Op) -> Iterator[Proposal]:
    refs = cast("tuple[Ref, ...]", op.attrs["params"])
    stacks = [op.inputs[ref.index] for ref in refs]
    x, ids, weights = op.inputs[:3]
    body = parse(cast(str, op.attrs["body"]))
    count = cast(int, op.attrs["num_experts"])
    if len(x.shape) != 2 or len(ids.shape) != 2:
        raise NoMatch(f"its input is {x.type} and its ids {ids.type}, expected [T, D] and [T, k]")
    yield Proposal(
        form="hf experts op",
        output=op.outputs[0],
        x=x,
        experts=keep_value(ids),
        weights=keep_value(weights),
        top_k=cast(int, ids.shape[1]),
        num_experts=count,
        stacks=tuple(map(keep_value, stacks)),
        body=body,
        cut=(x, ids, weights),
        feeds={ids: Ids(count, cast(int, ids.shape[1]), absent=True)},
    )


FORMS: tuple[Callable[[Scope], Iterator[Candidate]], ...] = (
    opaque_candidates,
    loop.candidates,
    batched.candidates,
    levels.candidates,
)


@dataclass(frozen=True)
class RecogniseExperts(Pass):
    """Experts written in any known form become moe.dispatch, moe.experts, moe.combine."""

    name: ClassVar[str] = "recognise-experts"
    takes: ClassVar[Stage] = Stage.ATEN
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        prover = Prover(program.weights)
        program = recognise_soft_mixtures(program, prover, log)
        program = recognise_neurons(program, prover, log)
        scope = Scope(program.graph, program.weights)
        blocks: dict[Op, Proposal] = {}
        covered: set[Op] = logits_of_slots(scope)
        refused: dict[Op, str] = {}
        for candidates in FORMS:
            for candidate in candidates(scope):
                if candidate.at in covered:
                    continue
                proved, reason = proved_blocks(scope, candidate, prover)
                if not proved and candidate.several and reason:
                    refused[candidate.at] = reason  # it is more specific: the experts were read
                elif not proved:
                    refused.setdefault(candidate.at, reason)
                for block in proved:
                    at = scope.graph.producers[block.output]
                    covered.update(scope.upstream([block.output], block.cut))
                    if at not in blocks and log.spend(f"{block.form} {at}"):
                        blocks[at] = block
        logged = False
        mixtures = dict(other_mixtures(scope, covered))
        for op, reason in (
            refused | {op: mixtures[op] for op in mixtures.keys() & refused}
        ).items():
            # Adding a block's result to another value looks like one more term of the same sum.
            adds = any(scope.maker(scope.source_of(value)) in blocks for value in op.inputs)
            if reason and not adds and op not in covered:
                log.decline(op.origin or op.outputs[0].name, reason)
                logged = True
        nodes = any(op.name.startswith("moe.") for op in scope.graph.ops)
        if not (blocks or nodes or any(refused.values())):
            for op, reason in other_choices(scope):
                log.decline(op.origin or op.outputs[0].name, reason, OTHER_CHOICES)
        for op, reason in () if logged else mixtures.items():
            log.decline(op.origin or op.outputs[0].name, reason, OTHER_CHOICES)
        return replace(program, graph=splice(scope.graph, blocks))


MOST_FAILURES = 256
"""After as many proposals that fail, a candidate is declined: what is proved comes among the first
hundred, and a router of many masks has thousands of readings."""


def proved_blocks(scope: Scope, candidate: Candidate, prover: Prover) -> tuple[list[Proposal], str]:
    """The proposals that the prover accepts: the first one, or of several the first for each
    output. Without any, the reason is that of the first proposal: later ones are variations of
    it."""
    reasons: list[str] = []
    proved: dict[Value, Proposal] = {}
    try:
        for proposal in candidate.propose():
            if proposal.output in proved:
                continue
            try:
                check(scope, proposal, prover, explained=not reasons)
            except NoMatch as why:
                reasons.append(next(iter(proposal.doubts), f"{proposal.form}: {why}"))
                if len(reasons) == MOST_FAILURES:
                    break
                continue
            proved[proposal.output] = proposal
            if not candidate.several:
                break
    except Unlike:
        pass
    except NoMatch as why:
        reasons.append(str(why))
    return list(proved.values()), reasons[0] if reasons else ""


def check(scope: Scope, block: Proposal, prover: Prover, explained: bool = True) -> None:
    """Raises NoMatch unless the block and its region give the same results; see `Prover.prove`."""
    region = scope.cut([block.output], block.cut)
    capacity = block.capacity.size if block.capacity is not None else None
    limits = (capacity,) if isinstance(capacity, int) else ()
    after = replacement_graph(scope, block)
    lost = tuple(missing_decisions(region, after, block.body, block.x))
    prover.prove(region, after, block.feeds, limits=limits, decisions=lost, explained=explained)


def replacement_graph(scope: Scope, block: Proposal) -> Graph:
    """The replacement as a separate graph with the inputs `cut`."""
    at = scope.graph.producers[block.output]
    return replacement(scope, at, block.cut, lambda emit: emit_block(block, emit))


def splice(graph: Graph, blocks: Mapping[Op, Proposal]) -> Graph:
    """The graph with each block in place of the op that produced its output."""
    builder = Builder(graph)
    new: dict[Value, Value] = {}
    for old in graph.ops:
        block = blocks.get(old)
        if block is None:
            op = replace(old, inputs=tuple(new.get(v, v) for v in old.inputs))
            builder.append(op)
            continue
        value = emit_block(block, RegionEmitter(builder, new, old))
        if block.output in graph.outputs:  # callers read it by its name
            builder.append(Op("aten.alias.default", (value,), (block.output,)))
        else:
            new[block.output] = value
    return rebuild(graph, builder.ops, new)
