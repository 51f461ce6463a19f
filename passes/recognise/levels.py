"""Form 7: gates at two levels or more, in which every token uses every expert.

    out = out + first[:, g, None] * sum(second_g[:, i, None] * expert_gi(x) for i)

The tree of sums and products becomes one block over all experts. Every token chooses the experts 0
.. E-1, and the weight of an expert is the product of the weights on the path to it. A weight has
one element per token, or one for several tokens (a gate that reads a sample). If the weights depend
on a choice, the block has another form, with fewer experts per token. A single level is recognised
by `moec.passes.recognise.mixture`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from moec.errors import NoMatch
from moec.ir.dims import Dim, product
from moec.ir.graph import Op, TensorType, Value
from moec.passes.proof.input_generators import Positive
from moec.passes.recognise.block import Candidate, Proposal
from moec.passes.recognise.region import RegionEmitter, Scope, chooses
from moec.passes.recognise.rows import Reader
from moec.passes.recognise.unrolled_experts import branch_ops, family, read_branch, signature

FORM = "every expert, weighed at {} levels"


@dataclass(frozen=True)
class Leaf:
    """The result of one expert and the weights [.., 1] that multiply it, the innermost first. All
    experts of a block have the same kind."""

    kind: tuple[str, ...]
    value: Value
    weights: tuple[Value, ...]


Tree = tuple[Leaf, ...]


def candidates(scope: Scope) -> Iterator[Candidate]:
    for op, tree in trees(scope).items():
        if depth(tree) > 1:
            yield Candidate(op, partial(propose, scope, op, tree))


def depth(tree: Tree) -> int:
    """The number of levels of gates."""
    return max(len(leaf.weights) for leaf in tree)


def trees(scope: Scope) -> dict[Op, Tree]:
    """Sums of at least two weighted experts, by their last op."""
    reader = Reader(scope)
    sums: dict[Value, Tree] = {}
    roots: dict[Op, Tree] = {}
    for op in scope.graph.ops:
        tree: Tree | None = None
        if op.name == "aten.mul.Tensor" and len(op.inputs) == 2:
            tree = _weighed(scope, op, sums)
        elif op.name == "aten.add.Tensor" and "alpha" not in op.attrs:
            tree = _added(reader, op, sums)
        if tree is None:
            continue
        sums[op.outputs[0]] = tree
        for value in op.inputs:
            maker = scope.maker(value)
            if value in sums and maker is not None:
                roots.pop(maker, None)
        if len(tree) > 1:
            roots[op] = tree
    return roots


def _added(reader: Reader, op: Op, sums: dict[Value, Tree]) -> Tree | None:
    """The sum of two trees; a sum may start from zeros, or from the number 0."""
    if len(op.inputs) == 1 and op.attrs.get("other") not in (0, 0.0):
        return None
    terms: Tree = ()
    for value in op.inputs:
        part = sums.get(value)
        if part is None and not reader.is_zeros(value):
            return None
        terms += part or ()
    return terms if len({leaf.kind for leaf in terms}) == 1 else None


def _weighed(scope: Scope, op: Op, sums: dict[Value, Tree]) -> Tree | None:
    for weight, value in (op.inputs, op.inputs[::-1]):
        if weight.shape[-1:] != (1,) or weight in scope.constants or weight in sums:
            continue
        if value in sums:
            return tuple(replace(leaf, weights=(*leaf.weights, weight)) for leaf in sums[value])
        kind = signature(scope, branch_ops(scope, value))
        if kind and not chooses(scope, weight):
            return (Leaf(kind, value, (weight,)),)
    return None


def propose(scope: Scope, anchor: Op, tree: Tree) -> Iterator[Proposal]:
    branches = [read_branch(scope, b.value, branch_ops(scope, b.value)) for b in tree]
    sources = {branch.reader.root for branch in branches}
    if len(sources) > 1:
        names = ", ".join(sorted(value.name for value in sources)[:3])
        raise NoMatch(f"its branches read different rows: {names}")
    members = family(scope, branches)
    x = members.first.reader.x
    assert x is not None
    weights = tuple(dict.fromkeys(value for leaf in tree for value in leaf.weights))
    yield Proposal(
        form=FORM.format(depth(tree)),
        output=anchor.outputs[0],
        x=x,
        experts=partial(_all_experts, product(x.shape[:-1]), len(tree)),
        weights=partial(_products, tree, x.shape[:-1]),
        top_k=len(tree),
        num_experts=len(tree),
        stacks=members.stacks,
        body=members.first.body,
        cut=tuple(dict.fromkeys((members.first.reader.root, *weights))),
        feeds=dict.fromkeys(weights, Positive()),
    )


def _all_experts(tokens: Dim, count: int, emit: RegionEmitter) -> Value:
    """The ids 0 .. E-1 for each token: [T, E]."""
    (ids,) = emit("aten.arange.default", [], [TensorType("i64", (count,))], attrs={"end": count})
    shape = (tokens, count)
    return emit("aten.expand.default", [ids], [TensorType("i64", shape)], attrs={"size": shape})[0]


def _products(tree: Tree, shape: tuple[Dim, ...], emit: RegionEmitter) -> Value:
    """The weights of all experts: [T, E]."""
    return emit.stack([_product(leaf.weights, shape, emit) for leaf in tree], 1)


def _product(weights: tuple[Value, ...], shape: tuple[Dim, ...], emit: RegionEmitter) -> Value:
    """The product [T] of weights [.., 1], each with one element per token or one for several
    tokens."""
    total: Value | None = None
    for weight in weights:
        value = emit.old(weight)
        full = (*shape, 1)
        if value.shape != full:
            full_type = TensorType(value.dtype, full)
            (value,) = emit("aten.expand.default", [value], [full_type], attrs={"size": full})
        value = emit.reshape(value, (product(shape),))
        if total is not None:
            (value,) = emit("aten.mul.Tensor", [total, value], [value.type])
        total = value
    assert total is not None
    return total
