"""Chains of additions in which each adds the result of one branch, as an unrolled loop does.

    out = out + expert_0(x); out = out + expert_1(x); …        also out[t] += …, where(mask, …, out)

Branches of one kind are experts with a network. Terms of another kind that a choice weighs, after
two or more of these, are experts without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from moec.ir.graph import Op, Value
from moec.passes.recognise.forms.branches.unrolled_experts import branch_ops, signature
from moec.passes.recognise.forms.loops.zero_experts import chosen
from moec.passes.recognise.reading.opnames import ADDS, CHOOSES
from moec.passes.recognise.reading.rows import Reader
from moec.passes.recognise.region import Scope, chooses

Kind = tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """The additions of a loop: each op with the branch that it adds.

    `start` is what the first addition adds to (None: zero), `kind` that of the branches of `links`,
    and `zero` the additions of experts without a network.
    """

    start: Value | None
    links: tuple[tuple[Op, Value], ...]
    kind: Kind | None
    zero: tuple[tuple[Op, Value], ...] = ()

    @property
    def last(self) -> Op:
        return (*self.links, *self.zero)[-1][0]


@dataclass(frozen=True)
class Addition:
    """One reading of an op that adds: the sum so far (None: zero), and the branch that is added."""

    before: Value | None
    branch: Value


@dataclass(frozen=True)
class BranchKinds:
    """The kinds of branches, read once each: None for a value that no branch computes."""

    scope: Scope
    by_value: dict[Value, Kind | None] = field(default_factory=dict)

    def kind(self, value: Value) -> Kind | None:
        if value not in self.by_value:
            self.by_value[value] = signature(self.scope, branch_ops(self.scope, value))
        return self.by_value[value]


def chains(scope: Scope) -> dict[Op, Chain]:
    """Sums of at least two branches of one kind, by their last op."""
    kinds, reader = BranchKinds(scope), Reader(scope)
    tails: dict[Value, Chain] = {}
    complete: dict[Op, Chain] = {}
    for op in scope.graph.ops:
        additions = additions_of(scope, op)
        for addition in additions:
            chain = tails.get(addition.before) if addition.before is not None else None
            longer = extend(kinds, chain, op, addition.branch) if chain is not None else None
            if chain is not None and longer is not None:
                complete.pop(chain.last, None)
                break
        else:
            longer = begin(kinds, reader, op, additions)
        if longer is not None:
            tails[op.outputs[0]] = longer
            if len(longer.links) > 1:
                complete[op] = longer
    return {op: chain for op, chain in complete.items() if weighed(scope, chain)}


def additions_of(scope: Scope, op: Op) -> Sequence[Addition]:
    """How an op may be read as the addition of a branch; empty for an op that is none."""
    if op.name in ADDS:
        return [Addition(op.inputs[0], added_to_rows(scope, op))]
    if op.name == CHOOSES:
        return [Addition(op.inputs[2], op.inputs[1])]
    if op.name != "aten.add.Tensor" or "alpha" in op.attrs:
        return []
    if len(op.inputs) == 1:
        return [Addition(None, op.inputs[0])] if op.attrs.get("other") in (0, 0.0) else []
    a, b = op.inputs
    return [Addition(a, b), Addition(b, a)]


def extend(kinds: BranchKinds, chain: Chain, op: Op, branch: Value) -> Chain | None:
    """The chain with one more link; None where `branch` is no expert of it."""
    if chain.kind == kinds.kind(branch) and not chain.zero:
        return replace(chain, links=(*chain.links, (op, branch)))
    if chain.kind and len(chain.links) > 1 and chosen(kinds.scope, op, branch):
        return replace(chain, zero=(*chain.zero, (op, branch)))
    return None


def begin(
    kinds: BranchKinds, reader: Reader, op: Op, additions: Sequence[Addition]
) -> Chain | None:
    """The chain that begins with an op: of both operands where these are branches of one kind, or
    of one branch that is added to something else."""
    if op.name == "aten.add.Tensor" and len(additions) == 2:
        first, second = additions[0].before, additions[0].branch
        assert first is not None
        kind = kinds.kind(first)
        if kind and kind == kinds.kind(second):
            return Chain(None, ((op, first), (op, second)), kind)
    for addition in additions:
        if kind := kinds.kind(addition.branch):
            before = addition.before
            start = None if before is None or reader.is_zeros(before) else before
            return Chain(start, ((op, addition.branch),), kind)
    return None


def added_to_rows(scope: Scope, op: Op) -> Value:
    """The value that `op` adds to the rows that it writes. `out[t] += y` is exported as `out[t] =
    out[t] + y`: for that form it is y, for others the written value."""
    before, *indices, values = op.inputs
    total = scope.made_by(values, "aten.add.Tensor")
    if op.attrs.get("accumulate") or total is None or "alpha" in total.attrs:
        return values
    if len(total.inputs) == 1:  # a number is added
        return values
    for picked, added in permutations(total.inputs):
        read = scope.made_by(picked, "aten.index.Tensor")
        if read is not None and read.inputs == (before, *indices):
            return added
    return values


def weighed(scope: Scope, chain: Chain) -> bool:
    """Whether a choice of experts weights or selects the branches; in other sums of layers it does
    not."""
    op, value = chain.links[-1]
    if op.name in (*ADDS, CHOOSES) or chooses(scope, value):
        return True
    product = scope.made_by(scope.behind_casts(value), "aten.mul.Tensor")
    return product is not None and any(v.shape[-1:] == (1,) for v in product.inputs)
