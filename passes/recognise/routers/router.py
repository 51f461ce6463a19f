"""Routers become moe.route: how logits [T, E] turn into weights [T, k] and experts [T, k].

The region between the logits and a block's choices is cut out. Its ops and constants (a softmax, a
sigmoid, a division, groups) limit the hypotheses, and each hypothesis is compared with the region
on random logits. A hypothesis is accepted by its results, however the region is written.

    w, i = topk(softmax(logits), 2); w = w / w.sum(-1)  ->  moe.route(logits) <k=2, renormalize>

Of equal scores both choose the first, as kernels do: a router whose scores are equal elsewhere is
another one. The order of a token's slots does not matter where the block sums over the slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch

from moec.dtypes import FLOATS, INDEX_DTYPES
from moec.errors import IRError, NoMatch
from moec.ir.graph import Graph, Op, Program, Stage, Value
from moec.ir.ops.experts.dispatch import chooses_all
from moec.ir.ops.routing.routing import Routing
from moec.ir.sizes.dims import Dim, product
from moec.ir.traits import rounds_doubles
from moec.passes.core.rewrite import Builder, rebuild
from moec.passes.core.runner import Log, Pass
from moec.passes.proof.branch_coverage import decisions
from moec.passes.proof.input_generators import Feed, Ids, InputKind
from moec.passes.proof.prove import TOLERANCE, Compare, Prover
from moec.passes.recognise.reading.layout import divide
from moec.passes.recognise.region import RegionEmitter, Scope, is_routing
from moec.passes.recognise.routers.expert_ids import Outside, repeated, widest_choice
from moec.passes.recognise.routers.region_boundary import logits_behind
from moec.passes.recognise.routers.rounded_choices import EagerChoices, roundings
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
        for block in ordered:
            block = replace(block, ordered=block.experts in by_slot)
            key = (block.weights, block.experts)
            if key in routers or shared(routers, block) is not None:
                continue
            where = block.dispatch.origin or block.dispatch.outputs[0].name
            try:
                router = recognise(scope, block, prover)
            except NoMatch as why:
                log.decline(where, f"router: custom: {why}")
                continue
            if log.spend(f"router of {where}"):
                routers[key] = router
        return replace(program, graph=splice(scope, routers))


Key = tuple[Value | None, Value]


def shared(routers: Mapping[Key, RecognisedRouter], block: Routed) -> Key | None:
    """The key of another block's router with the same choices, for a block that reads no
    weights."""
    if block.weights is not None:
        return None
    return next((key for key in routers if key[1] is block.experts), None)


@dataclass(frozen=True)
class Routed:
    """A recognised block as its router sees it."""

    dispatch: Op
    weigher: Op | None  # the op that reads the weights: the dispatch itself or the combine
    experts: Value  # [T, k], before any capacity
    weights: Value | None  # [T, k]
    num_experts: int
    zero: tuple[Op, ...] = ()  # moe.zero_experts, which read the same choices
    ordered: bool = False  # results of choices are not summed: the order of slots matters


@dataclass(frozen=True)
class RecognisedRouter:
    logits: Value
    correction: Value | None
    routing: Routing
    forced: Value | None = None  # the id of an expert that each token must have
    outside: Outside | None = None  # of the forced ids


def blocks(scope: Scope) -> Iterator[Routed]:
    for op in scope.graph.ops:
        if op.name != "moe.dispatch" or chooses_all(scope.graph, op):
            continue
        reader, position = chooser(scope, op)
        experts = reader.inputs[position]
        weigher, weights, slots = None, None, None
        if len(op.inputs) > 2:
            weigher, weights = op, op.inputs[2]
        for reader in scope.graph.readers.get(op.outputs[1], ()):
            if reader.name == "moe.combine":
                slots = reader.attrs["k"]
                if reader.attrs.get("weighted"):
                    weigher, weights = reader, reader.inputs[2]
        readers = scope.graph.readers[op.inputs[1]]
        zero = tuple(reader for reader in readers if reader.name == "moe.zero_experts")
        source = scope.source_of(experts, {"aten.reshape.default"})
        if _is_choices(source) and (weights is None or source.shape == weights.shape):
            experts = source  # the same choices with another number of slots per row
        groups = each_group(scope, experts)
        group_weights = None if weights is None else each_group(scope, weights)
        if groups is not None and (weights is None or group_weights is not None):
            experts, weights = groups, group_weights
        ordered = {slots, op.inputs[1].shape[-1]} != {experts.shape[-1]}
        count = cast(int, op.attrs["num_experts"])
        yield Routed(op, weigher, experts, weights, count, zero, ordered)


def each_group(scope: Scope, value: Value) -> Value | None:
    """The values [.., k] that consecutive rows share, if `value` repeats one for each of them."""
    repeats = scope.made_by(scope.source_of(value, {"aten.reshape.default"}), "aten.expand.default")
    if repeats is None:
        return None
    shaped = scope.made_by(repeats.inputs[0], "aten.reshape.default")
    values = (repeats.inputs[0], *(() if shaped is None else shaped.inputs))
    return next((value for value in reversed(values) if _is_choices(value)), None)


def chooser(scope: Scope, dispatch: Op) -> tuple[Op, int]:
    """The op that reads the choices before any capacity, and the index of that input. A capacity
    may sort the choices into another order first and restore it afterwards."""
    back = scope.made_by(dispatch.inputs[1], "aten.index.Tensor")
    drop = scope.made_by(back.inputs[0] if back else dispatch.inputs[1], "moe.capacity")
    if drop is None:
        return dispatch, 1
    ordered = scope.made_by(drop.inputs[0], "aten.index.Tensor") if back else None
    return ordered or drop, 0


def _is_choices(value: Value) -> bool:
    """Whether `value` is [T, k]. A choice per token of each text, [B, S], is not: S is a named
    size."""
    return len(value.shape) == 2 and isinstance(value.shape[1], int)


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
    k = cast(int, block.experts.shape[-1])
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
    for routing in hypotheses(region, k, dtype, block.num_experts):
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


def _repeated(emit: RegionEmitter, value: Value, shape: tuple[Dim, ...]) -> Value:
    """The choices [T, k] in another shape; if that has more rows, the k choices are repeated for
    consecutive rows."""
    count = divide(product(shape), product(value.shape))
    if count is not None and count != 1:
        groups, k = value.shape[0], cast(int, value.shape[1])
        value = repeated(emit, value, count, (product((groups, count)), k))
    return emit.reshape(value, shape)


def splice(scope: Scope, routers: Mapping[Key, RecognisedRouter]) -> Graph:
    """The graph in which blocks read the results of moe.route; other readers keep the old values.

    A replacement is (index of the op's input, key of the router, result of moe.route).
    """
    replacements: dict[Op, list[tuple[int, Key, int]]] = {}
    for block in blocks(scope):
        key: Key | None = (block.weights, block.experts)
        key = key if key in routers else shared(routers, block)
        if key is None or key not in routers:
            continue
        reader, position = chooser(scope, block.dispatch)
        replacements.setdefault(reader, []).append((position, key, 1))
        if block.weigher is not None:
            replacements.setdefault(block.weigher, []).append((2, key, 0))
        for op in block.zero:
            replacements.setdefault(op, []).extend(
                [
                    *([(1, key, 1)] if reader is block.dispatch else []),  # else after a capacity
                    *([(2, key, 0)] if key[0] else []),
                ]
            )
    builder = Builder(scope.graph)
    routes: dict[Key, tuple[Value, ...]] = {}
    for op in scope.graph.ops:
        inputs = list(op.inputs)
        for position, key, which in replacements.get(op, ()):
            if key not in routes:
                origin = cast(Op, scope.maker(key[1])).origin or op.origin
                routes[key] = _emit(
                    RegionEmitter(builder, {}, replace(op, origin=origin)), routers[key]
                )
            value = routes[key][which]
            emit = RegionEmitter(builder, {}, op)
            inputs[position] = _repeated(emit, value, op.inputs[position].shape)
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
