"""Form 7: sums of all experts, weighed by gates at one level or more.

    out = out + gate[:, e, None] * expert_e(x)              also after out = base(x), and scaled
    out = out + first[:, g, None] * sum(second_g[:, i, None] * expert_gi(x) for i)

The tree of sums and products becomes one block over all experts. Every token chooses the experts 0
.. E-1, and the weight of an expert is the product of the weights on the path to it. A weight has
one element per token, or one for several tokens (a gate that reads a sample). If the weights depend
on a choice, the block has another form, with fewer experts per token. Experts of different kinds
are recognised by `moec.passes.recognise.forms.soft.mixture`, and those whose results are stacked by
`moec.passes.recognise.forms.branches.every_expert`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from moec.errors import NoMatch
from moec.ir.graph import Op, TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.passes.proof.input_generators import weights_feed
from moec.passes.recognise.forms.branches.every_expert import FORM, all_experts
from moec.passes.recognise.forms.branches.unrolled_experts import (
    branch_ops,
    family,
    read_branch,
    signature,
)
from moec.passes.recognise.reading.block import Candidate, Proposal
from moec.passes.recognise.reading.rows import Reader
from moec.passes.recognise.region import RegionEmitter, Scope, chooses, sets_zeros


@dataclass(frozen=True)
class Leaf:
    """The result of one expert, and the weights [.., 1] and the number that multiply it; the
    innermost weight is the first. All experts of a block have the same kind."""

    kind: tuple[str, ...]
    value: Value
    weights: tuple[Value, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Tree:
    """The terms of a sum, and the value that the sum starts from if that is not zero."""

    leaves: tuple[Leaf, ...]
    start: Value | None = None


def candidates(scope: Scope) -> Iterator[Candidate]:
    for op, tree in trees(scope).items():
        yield Candidate(op, partial(propose, scope, op, tree))


def form(tree: Tree) -> str:
    levels = max(len(leaf.weights) for leaf in tree.leaves)
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
        elif op.name == "aten.mul.Tensor":
            tree = _scaled(op, sums)
        elif op.name == "aten.add.Tensor" and "alpha" not in op.attrs:
            tree = _added(reader, op, sums)
        if tree is None:
            continue
        sums[op.outputs[0]] = tree
        for value in op.inputs:
            maker = scope.maker(value)
            if value in sums and maker is not None:
                roots.pop(maker, None)
        if len(tree.leaves) > 1:
            roots[op] = tree
    return roots


def _added(reader: Reader, op: Op, sums: dict[Value, Tree]) -> Tree | None:
    """The sum of two trees. A sum may start from zeros, from the number 0, or from any other value
    that the first expert is added to."""
    if len(op.inputs) == 1 and op.attrs.get("other") not in (0, 0.0):
        return None
    trees = [sums[value] for value in op.inputs if value in sums]
    others = [v for v in op.inputs if v not in sums and not reader.is_zeros(v)]
    leaves = tuple(leaf for tree in trees for leaf in tree.leaves)
    starts = [*(tree.start for tree in trees if tree.start is not None), *others]
    if len({leaf.kind for leaf in leaves}) != 1 or len(starts) > 1:
        return None
    if others and (len(leaves) > 1 or others[0].type != op.outputs[0].type):
        return None
    return Tree(leaves, starts[0] if starts else None)


def _scaled(op: Op, sums: dict[Value, Tree]) -> Tree | None:
    """A tree times a number."""
    tree, number = sums.get(op.inputs[0]), op.attrs.get("other")
    if tree is None or tree.start is not None or not isinstance(number, int | float):
        return None
    return Tree(tuple(replace(leaf, scale=leaf.scale * number) for leaf in tree.leaves))


def _weighed(scope: Scope, op: Op, sums: dict[Value, Tree]) -> Tree | None:
    for weight, value in (op.inputs, op.inputs[::-1]):
        if weight.shape[-1:] != (1,) or weight in scope.constants or weight in sums:
            continue
        if value in sums:
            if sums[value].start is not None:
                return None
            leaves = sums[value].leaves
            return Tree(tuple(replace(leaf, weights=(*leaf.weights, weight)) for leaf in leaves))
        kind = signature(scope, branch_ops(scope, value))
        if kind and not chooses(scope, weight) and not sets_zeros(scope, weight):
            return Tree((Leaf(kind, value, (weight,)),))
    return None


def propose(scope: Scope, anchor: Op, tree: Tree) -> Iterator[Proposal]:
    leaves = tree.leaves
    branches = [read_branch(scope, b.value, branch_ops(scope, b.value)) for b in leaves]
    sources = {branch.reader.root for branch in branches}
    if len(sources) > 1:
        names = ", ".join(sorted(value.name for value in sources)[:3])
        raise NoMatch(f"its branches read different rows: {names}")
    members = family(scope, branches)
    x = members.first.reader.x
    assert x is not None
    gate = _columns(scope, leaves, x.shape[:-1])
    weights = tuple(dict.fromkeys(value for leaf in leaves for value in leaf.weights))
    recipe = partial(_products, leaves, x.shape[:-1])
    if gate is not None:
        weights, recipe = (gate,), partial(_rows, gate, leaves[0].scale)
    start = () if tree.start is None else (tree.start,)
    yield Proposal(
        form=form(tree),
        output=anchor.outputs[0],
        x=x,
        experts=all_experts(product(x.shape[:-1]), len(leaves)),
        weights=recipe,
        top_k=len(leaves),
        num_experts=len(leaves),
        stacks=members.stacks,
        body=members.first.body,
        cut=tuple(dict.fromkeys((members.first.reader.root, *weights, *start))),
        feeds={value: weights_feed(scope.ranges, value) for value in weights},
        addend=tree.start,
    )


def _products(leaves: tuple[Leaf, ...], shape: tuple[Dim, ...], emit: RegionEmitter) -> Value:
    """The weights of all experts: [T, E]."""
    return emit.stack([_product(leaf, shape, emit) for leaf in leaves], 1)


def _rows(gate: Value, scale: float, emit: RegionEmitter) -> Value:
    return _times(emit.rows(emit.old(gate)), scale, emit)


def _times(value: Value, scale: float, emit: RegionEmitter) -> Value:
    if scale == 1.0:
        return value
    return emit("aten.mul.Tensor", [value], [value.type], attrs={"other": scale})[0]


def _columns(scope: Scope, leaves: tuple[Leaf, ...], shape: tuple[Dim, ...]) -> Value | None:
    """The value [.., E] whose columns 0 .. E-1 are the weights of the experts, in their order."""
    sources: set[Value] = set()
    if len({leaf.scale for leaf in leaves}) > 1:
        return None
    for number, leaf in enumerate(leaves):
        column = scope.made_by(
            scope.source_of(leaf.weights[0]), "aten.select.int", "aten.slice.Tensor"
        )
        if len(leaf.weights) > 1 or column is None or not column.inputs[0].shape:
            return None
        index = column.attrs.get("index", column.attrs.get("start", 0))
        last = len(column.inputs[0].shape) - 1
        if index != number or column.attrs.get("dim", 0) not in (-1, last):
            return None
        sources.add(column.inputs[0])
    (gate, *others) = sources
    return gate if not others and gate.shape == (*shape, len(leaves)) else None


def _product(leaf: Leaf, shape: tuple[Dim, ...], emit: RegionEmitter) -> Value:
    """The product [T] of the weights [.., 1] of a leaf, each with one element per token or one for
    several tokens."""
    total: Value | None = None
    for weight in leaf.weights:
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
    return _times(total, leaf.scale, emit)
