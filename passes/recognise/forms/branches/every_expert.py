"""Form 11: every token uses every expert, and gates weigh the results.

    ys = stack([expert_0(x), expert_1(x), …], 1)                          [T, E, D]
    y = (softmax(gate(x))[:, :, None] * ys).sum(1)                        one block for each gate

Several gates over the same experts are those of multi-gate mixtures (Ma et al. 2018,
doi:10.1145/3219819.3220007, equations 5 to 7). Each becomes a block in which every token chooses
the experts 0 .. E-1. `moec.passes.simplify.share_experts` computes the experts once for all of
them. How the weights are computed does not matter. If they depend on a choice or a condition, such
as DynMoE's thresholds (arXiv 2405.14297, equations 3 to 6), an expert only reads the tokens for
which its weight is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from moec.dtypes import FLOATS
from moec.ir.graph import TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.ir.traits import THROUGH
from moec.passes.proof.input_generators import sparse_feed
from moec.passes.recognise.reading.block import Proposal
from moec.passes.recognise.reading.layout import ExpertLayout
from moec.passes.recognise.reading.rows import Reader
from moec.passes.recognise.region import Recipe, RegionEmitter, Scope, chooses, sets_zeros
from moec.passes.recognise.routers.routing import Unlike
from moec.passes.recognise.routers.routing_weights import unweighted_dropped

FORM = "every expert, weighed"
SOME = "experts whose weight is not zero"


def proposals(reader: Reader, ends: Sequence[tuple[Value, ExpertLayout]]) -> Iterator[Proposal]:
    """Blocks that end at the sums `ends`, those of all gates. Raises Unlike where weights that a
    condition sets to zero weigh the inputs of the experts."""
    scope, x, experts = reader.scope, reader.x, reader.writer.experts
    assert x is not None
    assert experts is not None
    tokens = product(x.shape[:-1])
    results = [(value, layout) for value, layout in ends if layout.axes[-1] == layout.features]
    sums = {value for value, _ in results}
    for value, layout in results:
        maker = scope.maker(value)
        if maker is not None and sums.intersection(maker.inputs):
            continue  # a rearranged sum
        body, stacks = reader.body(layout)
        for weights in weights_of(reader, value):
            is_sparse = chooses(scope, weights) or sets_zeros(scope, weights)
            if is_sparse and reader.input_side:
                raise Unlike(f"{weights.name} weighs what experts read: 0 need not give 0")
            for source, recipe in dense(scope, weights, tokens, experts):
                ids = all_experts(tokens, experts)
                yield Proposal(
                    form=SOME if is_sparse else FORM,
                    output=value,
                    x=x,
                    experts=unweighted_dropped(ids, recipe, experts) if is_sparse else ids,
                    weights=recipe,
                    top_k=experts,
                    num_experts=experts,
                    stacks=stacks,
                    body=body,
                    cut=(reader.root, source),
                    feeds={source: sparse_feed(scope.ranges, source)} if is_sparse else {},
                    input_side=reader.input_side,
                )


def weights_of(reader: Reader, result: Value) -> Iterator[Value]:
    """The values that weigh the experts on the way to `result`. Other gates weigh them too."""
    assert reader.x is not None
    between = reader.scope.upstream([result], [reader.root])
    read = {value for op in between for value in op.inputs}
    for role in ("mix", "weights"):
        yield from (value for value in reader.uses.get(role, ()) if value in read)


def dense(
    scope: Scope, weights: Value, tokens: Dim, experts: int
) -> Iterator[tuple[Value, Recipe]]:
    """Where the weights of all experts may begin, and recipes for [T, E], the farthest first.

    The axes of a weight, those of size 1 left out, are the tokens' and the experts', in one of both
    orders.
    """
    value: Value | None = weights
    sources: list[Value] = []
    while value is not None and value.dtype in FLOATS:
        if product(value.shape) == product((tokens, experts)):
            sources.append(value)
        op = scope.maker(value)
        value = op.inputs[0] if op is not None and op.name in THROUGH else None
    for source in reversed(sources):
        sizes = [size for size in source.shape if size != 1]
        if sizes[-1:] == [experts]:
            yield source, partial(_rows, source, (tokens, experts), False)
        if sizes[:1] == [experts]:
            yield source, partial(_rows, source, (experts, tokens), True)


def _rows(source: Value, shape: tuple[Dim, Dim], turned: bool, emit: RegionEmitter) -> Value:
    value = emit.reshape(emit.old(source), shape)
    return emit.permute(value, (1, 0)) if turned else value


def all_experts(tokens: Dim, count: int) -> Recipe:
    """A recipe for the ids 0 .. E-1 for each token: [T, E]."""

    def make(emit: RegionEmitter) -> Value:
        attrs = {"end": count}
        (ids,) = emit("aten.arange.default", [], [TensorType("i64", (count,))], attrs=attrs)
        return emit.expand(ids, (tokens, count))

    return make
