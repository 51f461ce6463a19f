"""Form 7: sums of all experts, weighed by gates at one level or more.

    out = out + gate[:, e, None] * expert_e(x)
    out = out + first[:, g, None] * sum(second_g[:, i, None] * expert_gi(x) for i)

The tree of sums and products becomes one block over all experts. Every token chooses the experts 0
.. E-1, and the weight of an expert is the product of the weights on the path to it. A weight has
one element per token, or one for several tokens (a gate that reads a sample). If the weights depend
on a choice, the block has another form, with fewer experts per token. Experts of different kinds
are recognised by `moec.passes.recognise.mixture`, and those whose results are stacked by
`moec.passes.recognise.every_expert`.
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
from moec.passes.recognise.every_expert import FORM, all_experts
from moec.passes.recognise.region import RegionEmitter, Scope, chooses
from moec.passes.recognise.rows import Reader
from moec.passes.recognise.unrolled_experts import branch_ops, family, read_branch, signature


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
        yield Candidate(op, partial(propose, scope, op, tree))


def form(tree: Tree) -> str:
    levels = max(len(leaf.weights) for leaf in tree)
    return FORM if levels == 1 else f"{FORM} at {levels} levels"


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
    gate = _columns(scope, tree, x.shape[:-1])
    weights = tuple(dict.fromkeys(value for leaf in tree for value in leaf.weights))
    recipe = partial(_products, tree, x.shape[:-1])
    if gate is not None:
        weights, recipe = (gate,), partial(_rows, gate)
    yield Proposal(
        form=form(tree),
        output=anchor.outputs[0],
        x=x,
        experts=all_experts(product(x.shape[:-1]), len(tree)),
        weights=recipe,
        top_k=len(tree),
        num_experts=len(tree),
        stacks=members.stacks,
        body=members.first.body,
        cut=tuple(dict.fromkeys((members.first.reader.root, *weights))),
        feeds=dict.fromkeys(weights, Positive()),
    )


def _products(tree: Tree, shape: tuple[Dim, ...], emit: RegionEmitter) -> Value:
    """The weights of all experts: [T, E]."""
    return emit.stack([_product(leaf.weights, shape, emit) for leaf in tree], 1)


def _rows(gate: Value, emit: RegionEmitter) -> Value:
    return emit.rows(emit.old(gate))


def _columns(scope: Scope, tree: Tree, shape: tuple[Dim, ...]) -> Value | None:
    """The value [.., E] whose columns 0 .. E-1 are the weights of the experts, in their order."""
    sources: set[Value] = set()
    for number, leaf in enumerate(tree):
        column = scope.made_by(
            scope.behind(leaf.weights[0]), "aten.select.int", "aten.slice.Tensor"
        )
        if len(leaf.weights) > 1 or column is None or not column.inputs[0].shape:
            return None
        index = column.attrs.get("index", column.attrs.get("start", 0))
        last = len(column.inputs[0].shape) - 1
        if index != number or column.attrs.get("dim", 0) not in (-1, last):
            return None
        sources.add(column.inputs[0])
    (gate, *others) = sources
    return gate if not others and gate.shape == (*shape, len(tree)) else None


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
