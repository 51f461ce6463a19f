"""Form 2: a loop over the experts, unrolled in the graph.

    out = out + (weights * (ids == e)).sum(-1)[:, None] * expert_e(x)            every token
    t, s = where(ids == e); out.index_add_(0, t, expert_e(x[t]) * weights[t, s]) its own rows
    t, s = where(ids == e); out.index_add_(0, t, x[t] * weights[t, s])           a copy of them
    t, s = where(ids == e); out[t] += expert_e(x[t]) * weights[t, s]
    t = where(ids == e);    out[t] = expert_e(x[t]) * weights[t]                 rows still zero
    out = where((ids == e)[:, None], expert_e(x) * weights[:, None], out)        rows still zero
    t = where(ids == e)[:C]; out[t] = expert_e(x[t])                     see `limit`
    t = scores[:, e].topk(C)[1]; out[t] += expert_e(x[t])                see expert_choice

Experts without a network (zero_experts.py) come after the others. The links of a chain are branches
with the same sequence of op names; its initial value is added after the block. The proof checks
that overwritten rows were zero or are written once. A loop over the slots, outside or inside that
over the experts, repeats each expert once per slot; the slots may share the expert's result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Op, TensorType, Value
from moec.ir.sizes.dims import Dim, canonical, product, symbols
from moec.ir.traits import CASTS, VIEWS
from moec.passes.proof.input_generators import ChosenRows, Feed
from moec.passes.recognise.forms.branches.every_expert import SOME, all_experts
from moec.passes.recognise.forms.branches.unrolled_experts import (
    Branch,
    Family,
    branch_ops,
    cone,
    family,
    named_by,
    number_of,
    read_branch,
    selected_by,
)
from moec.passes.recognise.forms.loops.chains import Chain, chains
from moec.passes.recognise.forms.loops.masks_of_experts import OpenExperts, as_rows, open_experts
from moec.passes.recognise.forms.loops.zero_experts import zero_experts
from moec.passes.recognise.forms.stacks import batched
from moec.passes.recognise.reading.block import (
    Candidate,
    Priority,
    Proposal,
    RecognisedCapacity,
    Zero,
)
from moec.passes.recognise.reading.body_writer import Fan
from moec.passes.recognise.reading.opnames import ADDS, SPREAD
from moec.passes.recognise.region import RegionEmitter, Scope, choices
from moec.passes.recognise.routers.evidence import Evidence
from moec.passes.recognise.routers.expert_ids import chosen_among
from moec.passes.recognise.routers.routing import hypotheses
from moec.passes.recognise.routers.routing_weights import dense_weights, unweighted_dropped

FORM = "static loop"


def goes_on(scope: Scope, anchor: Op, evidence: Evidence) -> bool:
    """Whether experts of another kind are added to the result of the chain."""
    output = anchor.outputs[0]
    choice_ops = set(choices(scope, evidence.values("ids", "order", "weights", "mask", "mix")))
    for reader in scope.graph.readers.get(output, ()):
        if reader.name in ADDS or reader.name == "aten.add.Tensor":
            others = [v for v in reader.inputs if v is not output]
            below = [v for other in others for op in cone(scope, other) for v in op.inputs]
            if choice_ops & set(choices(scope, [*others, *below])):
                return True
    return False


def candidates(scope: Scope) -> Iterator[Candidate]:
    for op, chain in chains(scope).items():
        copying = passed_through(scope, op) if chain.start is None else None
        if copying is not None:
            yield Candidate(copying, partial(propose, scope, copying, chain))
        # A term that a choice weighs after the experts may be a shared layer, and no expert.
        for count in reversed(range(len(chain.zero) + 1)):
            shorter = replace(chain, zero=chain.zero[:count])
            yield Candidate(shorter.last, partial(propose, scope, shorter.last, shorter))


def once_each(branches: list[Branch]) -> list[Branch]:
    """The first branch of each expert if all experts have equally many branches, as in a loop over
    slots. Otherwise all branches."""
    firsts = {branch.number: branch for branch in reversed(branches)}
    counts = Counter(branch.number for branch in branches)
    even = None not in counts and len(set(counts.values())) == 1
    return sorted(firsts.values(), key=branches.index) if even else branches


def one_slot_a_row(
    scope: Scope, anchor: Op, experts: Family, uses: dict[str, list[Value]]
) -> Iterator[Proposal]:
    """Proposals for rows that are copies of tokens, one copy per slot. The block then includes the
    sum over the slots of a token."""
    first = experts.first
    assert first.reader.x is not None
    axes = first.reader.writer.in_order(first.layout).axes
    count = len(experts.branches)
    fan = Fan(
        first.reader.x, first.body, experts.stacks, count, axes, uses, one_expert_per_row=True
    )
    try:
        for proposal in batched.propose(scope, anchor, {anchor: fan}):
            yield replace(proposal, form=FORM)
    except NoMatch:
        pass  # the copies are not summed within the block


def read_family(scope: Scope, chain: Chain) -> Family:
    """The branches of the chain's experts. Raises NoMatch if they read different rows."""
    branches: list[Branch] = []
    for op, value in chain.links:
        branch = read_branch(scope, value, branch_ops(scope, value))
        for role, selects in selected_by(op):
            branch.reader.use(role, selects)
            naming = named_by(scope, selects)
            if naming is not None and branch.number is None:
                branch = replace(branch, number=number_of(scope, [naming]))
            if naming is not None and naming.name == "aten.eq.Scalar":
                branch.reader.use("ids", naming.inputs[0])
        branches.append(branch)
    branches = once_each(branches)
    sources = {b.reader.root for b in branches}
    if len(sources) > 1:
        names = ", ".join(sorted(v.name for v in sources)[:3])
        raise NoMatch(f"its branches read different rows: {names}")
    if len({tuple(b.reader.shared) for b in branches}) > 1:
        raise NoMatch("its branches read rows of different shared products")
    return family(scope, branches)


def propose(scope: Scope, anchor: Op, chain: Chain) -> Iterator[Proposal]:
    """Blocks of the experts of a chain, whose result is that of `anchor`: by a choice of experts,
    or by masks that open them. Raises NoMatch, with the reason, where there is neither."""
    experts = read_family(scope, chain)
    first, count = experts.first, len(experts.branches)
    x = first.reader.x
    assert x is not None
    uses = uses_of(first)
    if chain.start is None and scope.made_by(scope.source_of(x), *SPREAD) is not None:
        yield from one_slot_a_row(scope, anchor, experts, uses)
    zero = zero_experts(scope, chain.zero, count, x) if chain.zero else None
    copies = overwritten(scope, chain.start, chain.links, x)
    if anchor is not chain.last:
        copies = Zero(("copy",))
    start = () if chain.start is None or copies is not None else (chain.start,)
    evidence = evidence_of(scope, anchor, experts, uses, zero, start)
    limited = limit(scope, [v for op, _ in chain.links for _, v in selected_by(op)])
    block = partial(
        Proposal,
        output=anchor.outputs[0],
        x=x,
        num_experts=count,
        stacks=experts.stacks,
        body=first.body,
        addend=start[0] if start else None,
        doubts=tuple(first.reader.doubts),
        shared=tuple(first.reader.shared),
    )
    no_choice = None
    try:
        for choice in hypotheses(scope, evidence):
            capacity = choice.capacity or limited
            if zero is not None and capacity is not None:
                continue
            yield block(
                FORM,
                experts=choice.experts,
                weights=choice.weights,
                top_k=choice.top_k,
                cut=tuple(dict.fromkeys((first.reader.root, *choice.cut, *start))),
                feeds=choice.feeds,
                input_side=first.reader.input_side,
                capacity=capacity,
                zero=zero or copies,
            )
    except NoMatch as error:
        no_choice = error
    if zero is None and copies is None:
        for mask in open_to_any(scope, evidence, experts, limited is not None):
            cut = tuple(dict.fromkeys((first.reader.root, *mask.cut, *start)))
            yield block(
                SOME,
                experts=mask.experts,
                weights=mask.weights,
                top_k=count,
                cut=cut,
                feeds=mask.feeds,
            )
    if no_choice is not None:
        raise no_choice


def open_to_any(
    scope: Scope, evidence: Evidence, experts: Family, limited: bool
) -> Iterator[OpenExperts]:
    """Hypotheses in which any number of experts read a token: those that chose it, or where their
    rows are not `limited`, those that a table opens."""
    columns = [branch.reader.uses for branch in experts.branches]
    yield from chosen_by_experts(scope, evidence, columns)
    if not limited:
        yield from open_experts(scope, evidence, columns)


def uses_of(branch: Branch) -> dict[str, list[Value]]:
    """What a branch reads beside its rows, by role; ids are compared with its number."""
    uses = {role: list(values) for role, values in branch.reader.uses.items()}
    for op in branch.ops:
        if op.name in ("aten.eq.Scalar", "aten.eq.Tensor"):
            uses.setdefault("ids", []).append(op.inputs[0])
    return uses


def evidence_of(
    scope: Scope,
    anchor: Op,
    experts: Family,
    uses: Mapping[str, Sequence[Value]],
    zero: Zero | None,
    start: tuple[Value, ...],
) -> Evidence:
    """What the block says of its router. Experts of the router without a link add nothing. Raises
    NoMatch where experts of another kind are added to the result."""
    first, count, output = experts.first, len(experts.branches), anchor.outputs[0]
    x = first.reader.x
    assert x is not None
    evidence = Evidence(
        {role: tuple(dict.fromkeys(values)) for role, values in uses.items()},
        count + (len(zero.kinds) if zero is not None else 0),
        product(x.shape[:-1]),
        product(output.shape[:-1]),
        output,
        (first.reader.root, *start),
    )
    among = chosen_among(scope, evidence)
    evidence = replace(evidence, open=among is None)
    if among is None or among <= evidence.experts:
        return evidence
    if zero is None and goes_on(scope, anchor, evidence):
        raise NoMatch(
            f"only {count} of the {among} experts that the router chooses among are alike"
        )
    return replace(evidence, experts=among)


_PARTS = VIEWS | {"aten.slice.Tensor", "aten.split_with_sizes.default"}


def overwritten(
    scope: Scope, start: Value | None, links: Sequence[tuple[Op, Value]], x: Value
) -> Zero | None:
    """A copy expert for the rows that no expert takes, if all results overwrite a copy of the
    tokens."""
    written = all(
        op.name == "aten.index_put.default"
        and not op.attrs.get("accumulate")
        and value is op.inputs[-1]
        for op, value in links
    )
    copied = start is not None and scope.source_of(start) is scope.source_of(x)
    return Zero(("copy",)) if written and copied else None


def passed_through(scope: Scope, last: Op) -> Op | None:
    """The op after the last expert that writes the tokens themselves into the rows that no expert
    takes: `out[dropped] = x[dropped]`."""
    readers = scope.graph.readers.get(last.outputs[0], ())
    if len(readers) != 1 or last.outputs[0] in scope.results:
        return None
    (op,) = readers
    if op.name != last.name or op.name != "aten.index_put.default" or op.attrs.get("accumulate"):
        return None
    picked = scope.made_by(op.inputs[-1], "aten.index.Tensor")
    if len(op.inputs) != 3 or picked is None or picked.inputs[1:] != op.inputs[1:2]:
        return None
    parts = scope.made_by(op.inputs[1], "aten.cat.default")
    return op if parts is not None else None


def limit(scope: Scope, rows: Sequence[Value]) -> RecognisedCapacity | None:
    """The capacity that the row lists of all experts have in common; None if they have none.

    Raises NoMatch if they differ: a proof need not have as many rows as the greatest.
    """
    limits = list(dict.fromkeys(_limit(scope, value) for value in rows))
    if len(limits) > 1:
        sizes = ", ".join("any" if limit is None else str(limit.size) for limit in limits)
        raise NoMatch(f"its experts take at most different numbers of rows: {sizes}")
    return limits[0] if limits else None


def _limit(scope: Scope, rows: Value) -> RecognisedCapacity | None:
    size = _least(scope, rows.shape[0]) if rows.shape else None
    if size is None:
        return None
    op = scope.made_by(scope.source_of(rows, _PARTS), "aten.index.Tensor")
    if op is None or len(op.inputs) != 2:
        return RecognisedCapacity(size, "token")
    order = scope.made_by(op.inputs[1], "aten.sort.default", "aten.sort.stable")
    read = scope.made_by(order.inputs[0], "aten.index.Tensor") if order is not None else None
    if order is None or read is None or read.inputs[1:] != (op.inputs[0],):
        return RecognisedCapacity(size, "token")
    priority = Priority(read.inputs[0], bool(order.attrs.get("descending", False)))
    return RecognisedCapacity(size, "token", priority)


def _least(scope: Scope, count: Dim) -> Dim | None:
    """C of min(rows, C): the one operand that does not depend on data."""
    if isinstance(count, int) or count.func.__name__ != "Min":  # the Min of sympy or of PyTorch
        return None
    sizes = {name for value in scope.graph.inputs for dim in value.shape for name in symbols(dim)}
    fixed = [canonical(part) for part in count.args if symbols(canonical(part)) <= sizes]
    return fixed[0] if len(fixed) == 1 else None


# Loops in which each expert reads the tokens that it chose (expert choice, arXiv 2202.09368).
#
#     v, t = scores.T.topk(C, -1)          [E, C], tokens for each expert, or the transpose
#     out.index_add_(0, t[e], expert_e(x[t[e]]) * v[e, :, None])
#
# Every token chooses all experts in a block, without those that did not choose it; the scores of
# the others are its weights.
_RANKINGS = ("aten.topk.default", "aten.sort.default", "aten.sort.stable")
"""Ops whose indices along an axis are distinct."""


def chosen_by_experts(
    scope: Scope, evidence: Evidence, uses: Sequence[Mapping[str, Sequence[Value]]]
) -> Iterator[OpenExperts]:
    """Hypotheses for the experts that use the values `uses`, by their roles."""
    tokens, experts = evidence.rows_in, evidence.experts
    rows, axis = _table(scope, [use.get("order", ()) for use in uses])
    if rows is None or not _distinct(scope, rows, 1 - axis):
        return
    at_rows = partial(_at_rows, rows, axis, tokens)
    ids = unweighted_dropped(all_experts(tokens, experts), partial(at_rows, None), experts)
    feeds: dict[Value, Feed] = {rows: ChosenRows(tokens, 1 - axis)}
    for role in ("weights", "mix"):
        weights, other = _table(scope, [use.get(role, ()) for use in uses])
        if weights is not None and weights.dtype in FLOATS and other == axis:
            if weights.shape == rows.shape:
                yield OpenExperts(ids, partial(at_rows, weights), (rows, weights), feeds)
    for weights in dense_weights(scope, evidence.values("weights", "mix"), evidence):
        recipe = partial(as_rows, weights, tokens, experts)
        yield OpenExperts(ids, recipe, (rows, weights), feeds)
    yield OpenExperts(ids, None, (rows,), feeds)


def _distinct(scope: Scope, rows: Value, axis: int) -> bool:
    """Whether the elements along an axis are distinct, as those of a ranking are."""
    ranking = scope.made_by(scope.source_of(rows, ("aten.slice.Tensor",)), *_RANKINGS)
    return ranking is not None and cast(int, ranking.attrs.get("dim", -1)) % 2 == axis


def _table(scope: Scope, uses: Sequence[Sequence[Value]]) -> tuple[Value | None, int]:
    """The value, [E, C] or [C, E], and its axis E, of which expert e uses index e first; None if
    there is none."""
    tables = set()
    for number, values in enumerate(uses):
        source = scope.source_of(values[0], VIEWS | CASTS) if values else None
        select = None if source is None else scope.made_by(source, "aten.select.int")
        if select is None or select.attrs["index"] != number or len(select.inputs[0].shape) != 2:
            return None, 0
        tables.add((select.inputs[0], cast(int, select.attrs.get("dim", 0)) % 2))
    ((table, axis), *others) = tables
    return (table, axis) if not others and table.shape[axis] == len(uses) else (None, 0)


def _at_rows(
    rows: Value, axis: int, tokens: Dim, values: Value | None, emit: RegionEmitter
) -> Value:
    """[T, E]: the values (None: 1) at the rows that experts chose, 0 elsewhere."""
    experts = rows.shape[axis]
    dtype, shape = "f32" if values is None else values.dtype, (experts, tokens)
    full = TensorType(dtype, shape)
    attrs: dict[str, Attr] = {"size": shape, "fill_value": 0, "dtype": DType(dtype)}
    (zeros,) = emit("aten.full.default", [], [full], attrs=attrs)
    operands = [emit.old(value) for value in (rows, values) if value is not None]
    if axis == 1:
        operands = [emit.permute(value, (1, 0)) for value in operands]
    at: dict[str, Attr] = {"dim": 1}
    if values is None:
        (table,) = emit("aten.scatter.value", [zeros, *operands], [full], attrs=at | {"value": 1})
    else:
        (table,) = emit("aten.scatter.src", [zeros, *operands], [full], attrs=at)
    return emit.permute(table, (1, 0))
