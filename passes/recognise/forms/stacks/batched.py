"""Forms 3 to 6: products of rows with stacks of expert weights.

    3. weights gathered per row, w[ids] -> [T, k, H, D], and a batched product
    4. rows sorted by expert, and a grouped product over the stack
    5. rows moved into [E, C, D] by a product with a dispatch mask, then a batched product
    6. every expert for every token, then a gather, or weights that are zero for unchosen experts

Starting at the first such product, the reader follows the rows forward until there is again one row
per token. Where rows go through attention before that, as the queries of heads that tokens choose
do, a block of form 3 ends with one row per choice.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from moec.errors import NoMatch
from moec.ir.graph import Op, TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.ir.traits import CASTS, VIEWS
from moec.passes.recognise.forms.branches import every_expert
from moec.passes.recognise.forms.branches.parallel_branches import fan
from moec.passes.recognise.reading.block import Candidate, Proposal
from moec.passes.recognise.reading.body_writer import Fan
from moec.passes.recognise.reading.layout import ExpertLayout, divide
from moec.passes.recognise.reading.opnames import PICKS, PRODUCTS
from moec.passes.recognise.reading.rows import Reader
from moec.passes.recognise.region import Recipe, RegionEmitter, Scope
from moec.passes.recognise.routers.evidence import Evidence
from moec.passes.recognise.routers.routing import hypotheses

# Form 10: the position of a row determines its expert; no op chooses among experts.
#
#     rows = x[scores.topk(C, over the tokens)]          [E, C, D], tokens that experts choose
#     y = stack([expert_e(rows[e]) for e in range(E)])
#
# The block begins at the rows and ends at the results of the experts. The ops that gather the rows
# from tokens and that return results to tokens stay outside. An expert needs at least two products
# over a stack: attention heads have a single one.

FORM = "each expert for its own rows"
_MOST = 3
"""How many values after the last product are tried as the result, the farthest first."""


def proposals(reader: Reader, ends: Sequence[tuple[Value, ExpertLayout]]) -> Iterator[Proposal]:
    """Blocks from the rows of `reader` to one of `ends`, where one axis of the rows is the expert
    axis."""
    x, experts = reader.x, reader.writer.experts
    assert x is not None
    assert experts is not None
    rows = [(value, layout) for value, layout in ends if not layout.reduced]
    results = [(value, layout) for value, layout in rows if layout.axes[-1] == layout.features]
    for value, layout in results[:_MOST]:
        body, stacks = reader.body(layout)
        if sum(op.name in PRODUCTS for op in body.ops) < 2:
            continue
        for ids in _numberings(x.shape[:-1], experts):
            yield Proposal(
                form=FORM,
                output=value,
                x=x,
                experts=ids,
                weights=None,
                top_k=1,
                num_experts=experts,
                stacks=stacks,
                body=body,
                cut=(reader.root,),
            )


def _numberings(shape: tuple[Dim, ...], experts: int) -> Iterator[Recipe]:
    """Recipes for the expert id of each row, [R, 1]: one for each axis that may be the expert
    axis."""
    for axis, size in enumerate(shape):
        if size == experts:
            yield partial(_numbered, shape, axis)
    each = divide(shape[0], experts)
    if shape[0] != experts and each is not None:
        yield partial(_numbered, (experts, each, *shape[1:]), 0)


def _numbered(shape: tuple[Dim, ...], axis: int, emit: RegionEmitter) -> Value:
    """The index of each row along `axis`: [R, 1]."""
    count = shape[axis]
    (ids,) = emit("aten.arange.default", [], [TensorType("i64", (count,))], attrs={"end": count})
    column = emit.reshape(ids, [count if i == axis else 1 for i in range(len(shape))])
    return emit.reshape(emit.expand(column, shape), (product(shape), 1))


_AFTER = VIEWS | CASTS | {"aten.sum.dim_IntList", "aten.permute.default"}
"""Ops that may follow the sum over the choices of a token."""


@dataclass(frozen=True)
class Ends:
    """Values that may hold one row per token again: sums over rows, the first ones first; rows that
    are not summed; sums that have more rows than there are tokens; and rows of one choice each."""

    summed: tuple[tuple[Value, ExpertLayout], ...]
    plain: tuple[tuple[Value, ExpertLayout], ...]
    unsummed: tuple[tuple[Value, ExpertLayout], ...]
    separate: tuple[tuple[Value, ExpertLayout], ...]

    @property
    def likely(self) -> list[tuple[Value, ExpertLayout]]:
        """The most likely ones, the best first."""
        return [
            *self.summed[:3],
            *reversed(self.plain[-6:]),
            *self.unsummed[:2],
            *reversed(self.separate[-2:]),
        ]


def candidates(scope: Scope) -> Iterator[Candidate]:
    fans, refused = fans_of(scope)
    for op in anchors(scope, fans):
        yield Candidate(op, partial(propose, scope, op, fans))
        yield Candidate(op, partial(propose_every, scope, op, fans), several=True)
    for op, why in refused.items():
        yield Candidate(op, partial(refuse, why))


def anchors(scope: Scope, fans: Mapping[Op, Fan]) -> Iterator[Op]:
    """The ops at which the experts of a block may begin: products with stacks, then fans."""
    for op in scope.graph.ops:
        if op.name in PRODUCTS and any(stacked(scope, v) for v in op.inputs):
            yield op
    yield from fans


def fans_of(scope: Scope) -> tuple[dict[Op, Fan], dict[Op, NoMatch]]:
    """The fans of the graph by the concatenations that end them, and the reasons against others."""
    fans: dict[Op, Fan] = {}
    refused: dict[Op, NoMatch] = {}
    for op in scope.graph.ops:
        try:
            match = fan(scope, op)
        except NoMatch as why:
            refused[op] = why
            continue
        if match is not None:
            fans[op] = match
    return fans, refused


def refuse(why: NoMatch) -> Iterator[Proposal]:
    raise why


def stacked(scope: Scope, value: Value) -> bool:
    """Whether `value` is a stack of matrices [E, N, K], or is gathered from one."""
    while True:
        source = scope.source_of(value, VIEWS | {"aten.permute.default", "aten.expand.default"})
        if source in scope.constants:
            return len(source.shape) == 3
        op = scope.made_by(source, *PICKS)
        if op is None:
            return False
        value = op.inputs[0]


def propose(scope: Scope, anchor: Op, fans: Mapping[Op, Fan]) -> Iterator[Proposal]:
    reader = Reader(scope, fans=fans.get)
    try:
        for value, layout in ends_of(reader, anchor, fans).likely:
            yield from at_end(reader, value, layout)
    except NoMatch:  # no op chooses among the experts
        alone = Reader(scope, fans=fans.get)
        try:
            alone.begin(rows_read(scope, anchor, fans))
            yield from proposals(alone, ends_of_own_rows(alone, anchor, fans))
        except NoMatch:
            pass  # report the first reason: it is more specific
        raise


def ends_of_own_rows(
    reader: Reader, anchor: Op, fans: Mapping[Op, Fan]
) -> list[tuple[Value, ExpertLayout]]:
    """Values that may hold the results of experts for their own rows: the last is that of a fan,
    which may be followed by a row of zeros for tokens without an expert."""
    result = anchor.outputs[0]
    try:
        ends = ends_of(reader, anchor, fans).likely
    except NoMatch:
        if anchor not in fans or result not in reader.memo:
            raise
        ends = []
    return [*ends, (result, reader.memo[result])] if anchor in fans else ends


def propose_every(scope: Scope, anchor: Op, fans: Mapping[Op, Fan]) -> Iterator[Proposal]:
    """Blocks in which every token uses every expert, one for each gate that weighs them."""
    reader = Reader(scope, fans=fans.get)
    yield from every_expert.proposals(reader, ends_of(reader, anchor, fans).summed)


def ends_of(reader: Reader, anchor: Op, fans: Mapping[Op, Fan]) -> Ends:
    """Reads the rows from `anchor` on. Raises NoMatch if they never become tokens again."""
    layouts = reader.apply(anchor)
    if layouts[0] is None:
        raise NoMatch(f"{anchor.name} is not a product of rows with stacked weights")
    reader.keep(anchor, layouts)
    splits = {fan.split: op for op, fan in fans.items() if fan.split is not None}
    ends = walk(reader, anchor, splits)
    if not ends.likely:
        reason = reader.why.get(anchor.outputs[0], "")
        raise NoMatch(reason or "the rows are never combined into tokens")
    return ends


def rows_read(scope: Scope, anchor: Op, fans: Mapping[Op, Fan]) -> Value:
    """The rows that a product, or the branches of a fan, read; the other inputs are weights."""
    if anchor in fans:
        return fans[anchor].x
    return next((v for v in anchor.inputs if not stacked(scope, v)), anchor.inputs[0])


def walk(reader: Reader, anchor: Op, splits: Mapping[Op, Op]) -> Ends:
    """Values after `anchor` that may hold one row per token.

    `splits` maps each split of rows by expert to the concatenation that joins its parts again.
    """
    scope = reader.scope
    heap: list[tuple[int, Op]] = []
    visited: set[Op] = set()

    def push(value: Value) -> None:
        for op in scope.graph.readers.get(value, ()):
            if op not in visited:
                visited.add(op)
                heapq.heappush(heap, (scope.position[op], op))

    tokens = rows_of(reader)
    summed: list[tuple[Value, ExpertLayout]] = []
    plain: list[tuple[Value, ExpertLayout]] = []
    unsummed: list[tuple[Value, ExpertLayout]] = []
    separate: list[tuple[Value, ExpertLayout]] = []  # one row per choice, never summed
    push(anchor.outputs[0])
    last = ""
    while heap and len(visited) < 3000:
        _, op = heapq.heappop(heap)
        if op in splits:
            heapq.heappush(heap, (scope.position[splits[op]], splits[op]))
            continue
        sources = [reader.memo[v] for v in op.inputs if v in reader.memo]
        if any(s.reduced for s in sources) and op.name not in _AFTER:
            continue
        try:
            layouts = reader.apply(op)
        except NoMatch as why:
            last = str(why)
            reader.opaque_values.update(op.outputs)
            reader.why |= dict.fromkeys(op.outputs, last)
            continue
        reader.keep(op, layouts)
        for value, layout in zip(op.outputs, layouts, strict=True):
            if layout is None or not layout.applied:
                continue
            push(value)
            if layout.rows == tokens:
                (summed if layout.reduced else plain).append((value, layout))
            elif layout.reduced and divide(tokens, layout.rows) is not None:
                summed.append((value, layout))  # `x` has one row per choice
            elif divide(layout.rows, tokens) is not None:
                if layout.reduced:
                    unsummed.append((value, layout))
                elif "ids" in reader.uses and token_major(layout, tokens):
                    separate.append((value, layout))
    if last:
        reader.why[anchor.outputs[0]] = last
    return Ends(tuple(summed), tuple(plain), tuple(unsummed), tuple(separate))


def token_major(layout: ExpertLayout, tokens: Dim) -> bool:
    """Whether the choices of a token are neighbours."""
    sizes = [atom.size for axis in layout.axes for atom in axis if atom.rows]
    return any(product(tuple(sizes[:end])) == tokens for end in range(1, len(sizes)))


def rows_of(reader: Reader) -> Dim:
    assert reader.x is not None
    return product(reader.x.shape[:-1])


def form_of(reader: Reader) -> str:
    if "ends" in reader.uses or "split" in reader.uses:
        return "sort + grouped_mm"
    if "dispatch" in reader.uses:
        return "dense dispatch with capacity"
    if "ids" in reader.uses:
        return "gathered weights"
    return "evaluate all, then select"


def at_end(reader: Reader, value: Value, layout: ExpertLayout) -> Iterator[Proposal]:
    assert reader.x is not None
    assert reader.writer.experts is not None
    body, stacks = reader.body(layout)
    addend = reader.addends.get(value)
    reads = (reader.root,) if addend is None else (reader.root, addend)
    evidence = Evidence(
        reader.uses,
        reader.writer.experts,
        rows_of(reader),
        product(value.shape[:-1]),
        value,
        reads,
    )
    for choice in hypotheses(reader.scope, evidence):
        yield Proposal(
            form=form_of(reader),
            output=value,
            x=reader.x,
            experts=choice.experts,
            weights=choice.weights,
            top_k=choice.top_k,
            num_experts=reader.writer.experts,
            stacks=stacks,
            body=body,
            cut=tuple(dict.fromkeys((*reads, *choice.cut))),
            feeds=choice.feeds,
            input_side=reader.input_side,
            capacity=choice.capacity,
            addend=addend,
        )
