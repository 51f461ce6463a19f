"""Routers become moe.route: how logits [T, E] turn into weights [T, k] and experts [T, k].

The region between the logits and a block's choices is cut out. Its ops and constants (a softmax, a
sigmoid, a division, groups) limit the hypotheses, and each hypothesis is compared with the region
on random logits. A hypothesis is accepted by its results, however the region is written.

    w, i = topk(softmax(logits), 2); w = w / w.sum(-1)  ->  moe.route(logits) <k=2, renormalize>

Of equal scores both choose the first, as kernels do: a router whose scores are equal elsewhere is
another one. The order of a token's slots does not matter where the block sums over the slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch

from moec.dtypes import FLOATS, INDEX_DTYPES
from moec.errors import IRError, NoMatch
from moec.ir.graph import Graph, Op, Program, Stage, Value
from moec.ir.ops.routing.routing import Routing
from moec.ir.sizes.dims import product
from moec.ir.traits import rounds_doubles
from moec.passes.core.rewrite import Builder, rebuild
from moec.passes.core.runner import Log, Pass
from moec.passes.proof.branch_coverage import decisions
from moec.passes.proof.input_generators import Feed, Ids, InputKind
from moec.passes.proof.prove import TOLERANCE, Compare, Prover
from moec.passes.recognise.reading.layout import divide
from moec.passes.recognise.region import RegionEmitter, Scope, is_routing
from moec.passes.recognise.routers.expert_ids import Outside, widest_choice
from moec.passes.recognise.routers.region_boundary import logits_behind
from moec.passes.recognise.routers.rounded_choices import EagerChoices, roundings
from moec.passes.recognise.routers.routed_blocks import (
    Key,
    Routed,
    blocks,
    earlier_choices,
    readers,
)
from moec.passes.recognise.routers.router_hypotheses import hypotheses

_ROWS = 1000
"""A proof uses more random tokens than this: different routers may differ on few tokens, above all
with groups. One of so many may choose another expert of equal weight: scores that are computed in
another order may differ in the last bit."""


@dataclass(frozen=True)
class RecogniseRouters(Pass):
    """The routing of each recognised block becomes moe.route."""

    name: ClassVar[str] = "recognise-routers"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        scope, prover = Scope(program.graph, program.weights), Prover(program.weights)
        routers: dict[Key, RecognisedRouter] = {}
        ordered = sorted(blocks(scope), key=lambda block: block.weights is None)
        by_slot = {block.experts for block in ordered if block.ordered}
        routed = [replace(block, ordered=block.experts in by_slot) for block in ordered]
        for block in tuple(routed):
            if block.key in routers or shared(routers, block) is not None:
                continue
            where = block.dispatch.origin or block.dispatch.outputs[0].name
            reasons: list[str] = []
            for variant in (block, *earlier_choices(scope, block)):
                try:
                    router = routers.get(variant.key) or recognise(scope, variant, prover)
                except NoMatch as why:
                    reasons.append(str(why))
                    continue
                if log.spend(f"router of {where}"):
                    routers[variant.key] = router
                    routed.append(variant)
                break
            else:
                log.decline(where, f"router: custom: {reasons[0]}")
        return replace(program, graph=splice(scope, routed, routers))


def shared(routers: Mapping[Key, RecognisedRouter], block: Routed) -> Key | None:
    """The key of another block's router with the same choices, for a block that reads no
    weights."""
    if block.weights is not None:
        return None
    return next((key for key in routers if key[1] is block.experts), None)


@dataclass(frozen=True)
class RecognisedRouter:
    logits: Value
    correction: Value | None
    routing: Routing
    forced: Value | None = None  # the id of an expert that each token must have
    outside: Outside | None = None  # of the forced ids


def recognise(scope: Scope, block: Routed, prover: Prover) -> RecognisedRouter:
    """The router of the block. Raises NoMatch with the reason if no `Routing` describes it."""
    maker = scope.maker(block.experts)
    if maker is not None and maker.name == "moe.route":
        raise NoMatch("it is moe.route already")
    results = [v for v in (block.weights, block.experts) if v is not None]
    reasons: list[str] = []
    among = widest_choice(scope, results) or 0  # more than num_experts if some have no network
    for count in sorted({block.num_experts, max(among, block.num_experts)}):
        variant = replace(block, num_experts=count)
        for logits in logits_behind(scope, results, count):
            try:
                return _hypothesise(scope, variant, results, logits, prover)
            except NoMatch as why:
                reasons.append(str(why))
    raise NoMatch(reasons[0] if reasons else "its choices are not computed from logits [.., E]")


def _hypothesise(
    scope: Scope, block: Routed, results: Sequence[Value], logits: Value, prover: Prover
) -> RecognisedRouter:
    k = divide(product(block.experts.shape), product(logits.shape[:-1]))
    if not isinstance(k, int):
        raise NoMatch(f"its choices are {block.experts.shape}, not k for each row of {logits.name}")
    # One forced choice of one leaves nothing to the router: the input is the choice itself.
    forced = forced_ids(scope, results, logits) if k > 1 else None
    region = scope.cut(results, [logits, *([] if forced is None else [forced])])
    if any(not is_routing(op) for op in region.ops):
        other = next(op for op in region.ops if not is_routing(op))
        raise NoMatch(
            f"{other.name} is between {logits.name} and the choices, and no known "
            "routing has it there"
        )
    last = {scope.source_of(value) for value in results}
    for op in region.ops:
        if rounds_doubles(op) and op.outputs[0] not in last:
            raise NoMatch(f"{op.outputs[0].name} is computed in another precision than the logits")
    corrections = [p for p in region.params if p.dtype in FLOATS and p.shape]
    if len(corrections) > 1 or any(product(p.shape) != block.num_experts for p in corrections):
        raise NoMatch(f"it adds {', '.join(map(repr, corrections))}, not one correction [E]")
    correction = corrections[0] if corrections else None
    feeds: dict[Value, Feed] = {logits: InputKind.LOGITS}
    if correction is not None:
        params = tuple(p for p in region.params if p is not correction)
        region = replace(region, inputs=(*region.inputs, correction), params=params)
        feeds[correction] = InputKind.CORRECTION
    outside = None
    if forced is not None:
        read = [value for op in region.ops for value in op.outputs]
        outside = Outside.of(scope, [forced], [forced, *read], block.num_experts)
        if outside.picks is None:
            raise NoMatch(f"what {forced.name} does where it names no expert is not known")
        feeds[forced] = Ids(block.num_experts, 1, least=outside.least)
    dtype = block.weights.dtype if block.weights is not None else "f32"
    count, reason, equal_but_for_rounding = 0, "", False
    routings = hypotheses(region, k, dtype, block.num_experts)
    if block.weights is None:
        routings = (r for r in routings if r.after == "none" and not r.renormalize and r.scale == 1)
    for routing in routings:
        if forced is not None and not may_force(routing):
            continue
        count += 1
        router = RecognisedRouter(logits, correction, routing, forced, outside)
        after = _router_graph(region, router, block)
        try:
            prover.prove(
                *(region, after, feeds),
                limits=(_ROWS,),
                decisions=tuple(decisions(region)),
                compare=_agree(block),
            )
        except NoMatch as why:
            reason = str(why)
            continue
        rounded = _with_roundings(region, router, block, prover, feeds)
        if rounded is not None:
            return rounded
        equal_but_for_rounding = True
    if equal_but_for_rounding:
        raise NoMatch("its scores are rounded to 16 bits where no known routing rounds")
    raise NoMatch(f"{count} forms of routing were tried from {logits.name}; the last one: {reason}")


def _with_roundings(
    region: Graph,
    router: RecognisedRouter,
    block: Routed,
    prover: Prover,
    feeds: Mapping[Value, Feed],
) -> RecognisedRouter | None:
    """The router with the roundings to 16 bits that its choices depend on; None if moe.route has
    no such roundings."""
    eager = EagerChoices(region, router.logits, router.correction, feeds, prover.weights)
    for routing in roundings(region, router.routing, router.correction is not None):
        variant = replace(router, routing=routing)
        if eager.equal(_router_graph(region, variant, block)):
            return variant
    return None


def _emit(emit: RegionEmitter, router: RecognisedRouter) -> tuple[Value, ...]:
    inputs = [emit.rows(emit.old(router.logits))]
    if router.correction is not None:
        inputs.append(emit.reshape(emit.old(router.correction), router.logits.shape[-1:]))
    stem = f"{router.logits.name}_weights"
    choices = emit("moe.route", inputs, attrs=router.routing.attrs(), named=stem)
    if router.forced is None or router.outside is None:
        return choices
    forced = router.outside.named(emit, emit.old(router.forced))
    values = [*choices, inputs[0], emit.reshape(forced, inputs[0].shape[:1])]
    named = choices[0].name
    return emit("moe.force", values, attrs=router.routing.attrs(), named=named)


def _router_graph(region: Graph, router: RecognisedRouter, block: Routed) -> Graph:
    builder = Builder(replace(region, ops=(), outputs=()))
    like = Op("moe.route", (), (router.logits,))
    try:
        weights, experts = _emit(RegionEmitter(builder, {}, like), router)
    except IRError as error:
        raise NoMatch(str(error)) from None
    outputs = (experts,) if block.weights is None else (weights, experts)
    return Graph(region.inputs, region.params, tuple(builder.ops), outputs, (), region.bounds)


def _agree(block: Routed) -> Compare:
    """Compares choices and weights; the order of slots counts if the block is `ordered`."""

    def compare(
        before: Sequence[torch.Tensor],
        after: Sequence[torch.Tensor],
        inputs: Mapping[Value, torch.Tensor],
    ) -> str:
        if before[-1].numel() == after[-1].numel():
            before = [result.reshape(after[-1].shape) for result in before]
        shapes = [[tuple(t.shape) for t in result] for result in (before, after)]
        if shapes[0] != shapes[1]:
            return f"its choices are {shapes[0]}, not {shapes[1]}"
        if not before[-1].numel():
            return ""
        ids, weights = [], []
        for result in (before, after):
            if int(result[-1].min()) < 0 or int(result[-1].max()) >= block.num_experts:
                return "it chooses ids that are not experts"
            ids.append(result[-1].long().sort(-1))
            weights.append(result[0].float() if len(result) > 1 else torch.zeros(shapes[0][-1]))
        same = (ids[0].values == ids[1].values).all(-1, keepdim=True)
        if block.ordered:
            same &= (before[-1] == after[-1]).all(-1, keepdim=True)
        by_id = [w.gather(1, chosen.indices) for w, chosen in zip(weights, ids, strict=True)]
        by_size = [w.sort(-1).values for w in weights]
        error = torch.where(same, by_id[0] - by_id[1], by_size[0] - by_size[1]).abs()
        most = TOLERANCE * max(float(weights[0].abs().max()), 1e-3)
        few = int((~same).sum()) * _ROWS <= len(same)
        return "" if few and bool((error <= most).all()) else "weights or choices differ"

    return compare


def splice(
    scope: Scope, routed: Sequence[Routed], routers: Mapping[Key, RecognisedRouter]
) -> Graph:
    """The graph in which blocks read the results of moe.route; others keep the old values."""
    replaced: dict[Op, dict[Value, tuple[Key, int]]] = {}
    for block in routed:
        key = block.key if block.key in routers else shared(routers, block)
        if key is not None and key in routers:
            for op in readers(scope, block):
                results = {v: (key, which) for which, v in enumerate(key) if v in op.inputs}
                replaced[op] = replaced.get(op, {}) | results
    builder = Builder(scope.graph)
    routes: dict[Key, tuple[Value, ...]] = {}
    for op in scope.graph.ops:
        inputs = list(op.inputs)
        for value, (key, which) in replaced.get(op, {}).items():
            if key not in routes:
                origin = cast(Op, scope.maker(key[1])).origin or op.origin
                emit = RegionEmitter(builder, {}, replace(op, origin=origin))
                routes[key] = _emit(emit, routers[key])
            new = RegionEmitter(builder, {}, op).reshape(routes[key][which], value.shape)
            inputs = [new if v is value else v for v in inputs]
        builder.append(replace(op, inputs=tuple(inputs)))
    return rebuild(scope.graph, builder.ops, {})


def forced_ids(scope: Scope, results: Sequence[Value], logits: Value) -> Value | None:
    """The only integer input, one id per token, that the choices read besides the logits; None if
    there is none."""
    ops = scope.upstream(results, [logits])
    others = [v for v in scope.leaves(ops, [logits]) if v not in scope.params]
    tokens = product(logits.shape[:-1])
    if len(others) == 1 and others[0].dtype in INDEX_DTYPES:
        return others[0] if product(others[0].shape) == tokens else None
    return None


def may_force(routing: Routing) -> bool:
    """Whether the weight of a forced expert depends only on its score: moe.force supports no
    others."""
    alone = routing.after == "none" and not routing.renormalize and routing.groups == 1
    return alone and routing.score != "sparsemixer"
