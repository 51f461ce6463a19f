"""Form 8: experts whose inputs are slots, weighted sums of all tokens (Soft MoE, arXiv 2308.00951).

    logits = x @ phi                                    [B, S, E, P]
    slots = einsum("bsd,bsep->bepd", x, softmax(logits, 1))
    outs = stack([expert(slots[:, e]) for e, expert in enumerate(experts)], 1)
    y = einsum("bepd,bsep->bsd", outs, softmax(logits.flatten(2), -1))

becomes one moe.soft_mixture: no expert is chosen, so there is no dispatch and no top-k. The region
begins at the logits; the ops that compute them (norms, scales, masks, or a separate phi for each of
the two softmaxes) stay outside. The ops between the two products are read like the experts of other
forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moec.errors import NoMatch
from moec.ir.graph import Attr, Graph, Op, Program, TensorType, Value
from moec.ir.traits import VIEWS
from moec.passes.core.runner import Log
from moec.passes.proof.input_generators import InputKind
from moec.passes.proof.prove import Prover
from moec.passes.recognise.forms.branches.parallel_branches import fan
from moec.passes.recognise.forms.branches.unrolled_experts import (
    Family,
    cone,
    family,
    read_branch,
    signature,
)
from moec.passes.recognise.forms.soft.mixture import ADD, adds_on, summed
from moec.passes.recognise.forms.soft.soft_weights import SoftWeights, WeighedSum, weighed_sum
from moec.passes.recognise.reading.block import stacked
from moec.passes.recognise.reading.body import ROWS, canonical, with_columns
from moec.passes.recognise.reading.body_writer import Fan
from moec.passes.recognise.reading.layout import Atom, Axis, ExpertLayout, size_of
from moec.passes.recognise.reading.opnames import REARRANGE
from moec.passes.recognise.reading.rows import Reader
from moec.passes.recognise.region import Recipe, RegionEmitter, Scope, replaced, replacement

# Soft mixtures written as a loop that adds the output of each expert.
#
#     for e, expert in enumerate(experts):
#         y = y + combine[:, :, e] @ expert(dispatch[:, :, e].mT @ x)
#
# The weights of one expert are a slice of the weights of all experts. With the axis that they are
# sliced from, the sum is one product over all slots, as in `soft_mixture`.


@dataclass(frozen=True)
class Step:
    """The slots of one expert, and the values that it adds to the tokens."""

    dispatch: WeighedSum
    combine: WeighedSum


@dataclass(frozen=True)
class SoftLoop:
    """The last add of the loop, and its steps in the order of the experts."""

    op: Op
    steps: tuple[Step, ...]

    @property
    def dispatch(self) -> WeighedSum:
        """The weighted sum that computes the slots of all experts."""
        first = self.steps[0].dispatch
        weights = first.weights
        return replace(first, weights=replace(weights, free=(*weights.picked, *weights.free)))

    @property
    def combine(self) -> WeighedSum:
        """The sum over the slots of all experts."""
        first = self.steps[0].combine
        weights = first.weights
        every = replace(weights, summed=(*weights.picked, *weights.summed))
        return replace(first, op=self.op, weights=every, flipped=False)

    def experts(self, scope: Scope) -> Family:
        """The experts of all steps. Raises NoMatch unless they are of one kind, with one step per
        expert."""
        count = size_of(self.steps[0].combine.weights.picked)
        numbers = [(s.dispatch.weights.index, s.combine.weights.index) for s in self.steps]
        if numbers != [(number, number) for number in range(len(numbers))]:
            raise NoMatch(
                f"its steps weight the slots and the tokens of different experts: {numbers}"
            )
        if len(numbers) != count:
            raise NoMatch(f"it has {len(numbers)} steps, and weights of {count} experts")
        tokens = {scope.source_of(step.dispatch.values, VIEWS) for step in self.steps}
        if len(tokens) > 1:
            raise NoMatch("its steps read different tokens")
        branches = []
        for step in self.steps:
            between = scope.upstream([step.combine.values], step.dispatch.op.outputs)
            branches.append(read_branch(scope, step.combine.values, between))
        return family(scope, branches)


def soft_loops(scope: Scope) -> Iterator[SoftLoop]:
    """Sums of products whose weights are slices of a softmax; their slots are weighted by such
    slices too."""
    for op in scope.graph.ops:
        if op.name != ADD or adds_on(scope, op):
            continue
        steps = [
            _step(scope, scope.maker(scope.source_of(t.value, REARRANGE)))
            for t in summed(scope, op)
        ]
        alike = [step for step in steps if step is not None]
        if len(alike) > 1 and len(alike) == len(steps) and _of_one_softmax(alike):
            yield SoftLoop(op, tuple(sorted(alike, key=lambda s: s.combine.weights.index)))


def _step(scope: Scope, op: Op | None) -> Step | None:
    combine = None if op is None else weighed_sum(scope, op)
    if combine is None or not combine.weights.picked:
        return None
    for before in reversed(scope.upstream([combine.values])):
        dispatch = weighed_sum(scope, before)
        if dispatch is not None:
            return Step(dispatch, combine) if dispatch.weights.picked else None
    return None


def _of_one_softmax(steps: Sequence[Step]) -> bool:
    return len({(s.dispatch.weights.logits, s.combine.weights.logits) for s in steps}) == 1


@dataclass(frozen=True)
class SlotExperts:
    """The body of one expert, and recipes for the stacks of its params."""

    count: int
    body: Graph
    stacks: tuple[Recipe, ...]


@dataclass(frozen=True)
class SoftMixture:
    """`slot_major`: slot n belongs to expert n % E, as its slot n // E; otherwise to expert n // P,
    as its slot n % P."""

    dispatch: WeighedSum
    combine: WeighedSum
    experts: SlotExperts
    slot_major: bool

    @property
    def cut(self) -> tuple[Value, ...]:
        logits = (self.dispatch.weights.logits, self.combine.weights.logits)
        return tuple(dict.fromkeys((self.dispatch.values, *logits)))


def recognise_soft_mixtures(program: Program, prover: Prover, log: Log) -> Program:
    """The program with its soft mixtures as nodes; the reason for each refusal is logged."""
    scope = Scope(program.graph, program.weights)
    mixtures: dict[Op, SoftMixture] = {}
    attempts = [(c.op, partial(proved_pair, scope, d, c, prover)) for d, c in pairs(scope)]
    attempts += [(loop.op, partial(proved_loop, scope, loop, prover)) for loop in soft_loops(scope)]
    for at, attempt in attempts:
        try:
            mixture = attempt()
        except NoMatch as why:
            log.decline(at.origin or at.outputs[0].name, f"soft mixture: {why}")
            continue
        if log.spend(f"soft mixture {at}"):
            mixtures[at] = mixture
    emits = {op: partial(emit, mixture) for op, mixture in mixtures.items()}
    return replace(program, graph=replaced(scope.graph, emits))


def logits_of_slots(scope: Scope) -> set[Op]:
    """The products that compute logits of soft mixtures: their stack phi [D, E, P] is no expert
    weight."""
    mixtures = [op for op in scope.graph.ops if op.name == "moe.soft_mixture"]
    logits = [scope.maker(scope.source_of(v, REARRANGE)) for op in mixtures for v in op.inputs[1:3]]
    return {op for op in logits if op is not None}


def pairs(scope: Scope) -> Iterator[tuple[WeighedSum, WeighedSum]]:
    """Products weighted by a softmax, where the values of the second depend on the first and its
    weights do not. (In consecutive attention layers, the weights depend on the first too.)"""
    sums = [one for op in scope.graph.ops if (one := weighed_sum(scope, op)) is not None]
    sums = [one for one in sums if not one.weights.picked]
    for position, combine in enumerate(sums):
        slots = size_of(combine.weights.summed)
        earlier = [
            dispatch
            for dispatch in reversed(sums[:position])
            if isinstance(slots, int) and size_of(dispatch.weights.free) == slots
        ]
        if not earlier:
            continue
        behind = set(scope.upstream([combine.values]))
        before = set(scope.upstream([combine.source]))
        for dispatch in earlier:
            if dispatch.op in behind and dispatch.op not in before:
                yield dispatch, combine
                break


def proved_pair(
    scope: Scope, dispatch: WeighedSum, combine: WeighedSum, prover: Prover
) -> SoftMixture:
    """Raises NoMatch unless a soft mixture gives the same results as the ops between the two
    products."""
    _check(dispatch.weights, "dispatch", "the tokens")
    _check(combine.weights, "combine", "all slots")
    experts = slot_experts(scope, dispatch, combine)
    slots = size_of(combine.weights.summed)
    if not isinstance(slots, int) or slots % experts.count:
        raise NoMatch(f"its {slots} slots are not as many for each of {experts.count} experts")
    reasons = []
    for slot_major in (False, True)[: 1 + (1 < experts.count < slots)]:
        try:
            return _proved(scope, SoftMixture(dispatch, combine, experts, slot_major), prover)
        except NoMatch as why:
            reasons.append(str(why))
    raise NoMatch(reasons[0])


def proved_loop(scope: Scope, loop: SoftLoop, prover: Prover) -> SoftMixture:
    """Raises NoMatch unless a soft mixture gives the same result as the sum of the loop's steps."""
    dispatch, combine = loop.dispatch, loop.combine
    _check(dispatch.weights, "dispatch", "the tokens")
    _check(combine.weights, "combine", "all slots")
    experts = loop.experts(scope)
    slots = SlotExperts(len(loop.steps), experts.first.body, experts.stacks)
    return _proved(scope, SoftMixture(dispatch, combine, slots, False), prover)


def _proved(scope: Scope, mixture: SoftMixture, prover: Prover) -> SoftMixture:
    """Returns the mixture. Raises NoMatch unless it gives the same results as the matched ops."""
    at, cut = mixture.combine.op, mixture.cut
    region = scope.cut([at.outputs[0]], cut)
    after = replacement(scope, at, cut, partial(emit, mixture))
    prover.prove(region, after, dict.fromkeys(cut[1:] or cut, InputKind.LOGITS))
    return mixture


def _check(weights: SoftWeights, which: str, axis: str) -> None:
    """Raises NoMatch unless the softmax is over the axis that the product sums over."""
    if weights.after:
        raise NoMatch(f"{weights.after} is between a softmax and the {which} that it weights")
    if set(weights.over or ()) != set(weights.summed):
        over = " x ".join(str(atom.size) for atom in weights.over or ()) or "one"
        total = size_of(weights.summed)
        raise NoMatch(f"its {which} weights are a softmax over {over}, not over {axis}, {total}")


def slot_experts(scope: Scope, dispatch: WeighedSum, combine: WeighedSum) -> SlotExperts:
    """The experts between the two products. Raises NoMatch unless they are of one kind, each with
    its own slots."""
    slots = dispatch.op.outputs[0]
    between = scope.upstream([combine.values], [slots])
    fans: dict[Op, Fan] = {}
    for op in between:
        match = fan(scope, op)
        if match is not None:
            fans[op] = match
    reader = Reader(scope, only=frozenset(between), fans=fans.get)
    reader.x = slots
    reader.memo[slots] = _rows(slots, dispatch.flipped)
    for match in fans.values():
        reader.read(match.x)
    layout = reader.read(combine.values)
    if layout is not None and layout.applied and reader.writer.experts is not None:
        body, stacks = reader.body(layout)
        return SlotExperts(reader.writer.experts, body, stacks)
    if fans or reader.writer.experts not in (None, 1):
        why = reader.why.get(combine.values) or next(iter(reader.why.values()), "")
        raise NoMatch(f"the ops between its two products are not experts: {why}")
    if any(_unlike_branches(scope, op) for op in between):
        raise NoMatch("its experts differ in more than their weights")
    branch = read_branch(scope, combine.values, between)
    return SlotExperts(1, branch.body, family(scope, [branch]).stacks)


def _unlike_branches(scope: Scope, op: Op) -> bool:
    """Whether `op` concatenates the results of networks that may differ in kind."""
    if op.name != "aten.cat.default":
        return False
    kinds = [signature(scope, cone(scope, value)) for value in op.inputs]
    return None not in kinds and len(set(kinds)) > 1


def _rows(slots: Value, flipped: bool) -> ExpertLayout:
    """The layout of slots [.., N, D], or [.., D, N] if `flipped`."""
    feature = Atom(slots.shape[-2 if flipped else -1], False)
    axes: list[Axis] = [(Atom(size, True),) if size != 1 else () for size in slots.shape]
    axes[-2 if flipped else -1] = (feature,)
    base = Value("x", TensorType(slots.dtype, (ROWS, feature.size)))
    return ExpertLayout(base, (feature,), tuple(axes))


def emit(mixture: SoftMixture, emit: RegionEmitter) -> Value:
    """Emits the node, with its result in the shape of the combining product."""
    dispatch, combine, experts = mixture.dispatch, mixture.combine, mixture.experts
    to_slots, to_tokens = dispatch.weights, combine.weights
    shape = tuple(map(size_of, (to_slots.batch, to_slots.summed, to_slots.free)))
    x = emit.old(dispatch.values)
    x = _transpose(x, emit) if dispatch.flipped else x
    x = emit.reshape(x, (*shape[:2], x.shape[-1]))
    orders = [
        to_slots.order((*to_slots.batch, *to_slots.summed, *to_slots.free)),
        to_tokens.order((*to_tokens.batch, *to_tokens.free, *to_tokens.summed)),
    ]
    logits = [to_slots.emit(emit, orders[0], shape)]
    same = to_slots.logits is to_tokens.logits and orders[0] == orders[1]
    logits.append(logits[0] if same else to_tokens.emit(emit, orders[1], shape))
    count = experts.count
    if mixture.slot_major:
        new = {value: _expert_major(value, count, emit) for value in dict.fromkeys(logits)}
        logits = [new[value] for value in logits]
    body, prepared = canonical(with_columns(experts.body), count)
    stacks = [stacked(experts.stacks[p.source](emit), p, emit) for p in prepared]
    attrs: dict[str, Attr] = {"num_experts": count}
    output = combine.op.outputs[0]
    (y,) = emit(
        "moe.soft_mixture", [x, *logits, *stacks], attrs=attrs, body=body, named=output.name
    )
    return emit.reshape(_transpose(y, emit) if combine.flipped else y, output.shape)


def _transpose(value: Value, emit: RegionEmitter) -> Value:
    last = len(value.shape) - 1
    return emit.permute(value, (*range(last - 1), last, last - 1))


def _expert_major(logits: Value, experts: int, emit: RegionEmitter) -> Value:
    batch, tokens, slots = logits.shape
    assert isinstance(slots, int)
    value = emit.reshape(logits, (batch, tokens, slots // experts, experts))
    return emit.reshape(emit.permute(value, (0, 1, 3, 2)), logits.shape)
