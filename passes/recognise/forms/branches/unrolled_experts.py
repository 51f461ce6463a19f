"""Experts written out one by one: branches of the graph that differ only in their weights.

A branch is the set of ops that only one expert's result depends on. Each branch is read separately;
if all bodies are equal, each param of the body is stacked over the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.canonical import canonical_text
from moec.ir.graph import Attr, Graph, Op, Ref, Value
from moec.ir.sizes.dims import Dim
from moec.ir.traits import CHOICES, VIEWS
from moec.passes.recognise.reading.body_writer import BodyWriter
from moec.passes.recognise.reading.layout import ExpertLayout
from moec.passes.recognise.reading.opnames import ADDS, CHOOSES, MULTIPLY, PRODUCTS
from moec.passes.recognise.reading.rows import Reader
from moec.passes.recognise.region import Recipe, RegionEmitter, Scope, names_in

_LIMIT = 300


@dataclass(frozen=True)
class Branch:
    """One expert's branch: the ops that compute `result`. `layout` is the layout of the result over
    the rows `reader.x`."""

    result: Value
    ops: tuple[Op, ...]
    reader: Reader
    layout: ExpertLayout
    body: Graph
    number: int | None  # the expert id that its mask is compared with

    @property
    def text(self) -> str:
        return canonical_text(self.body)


def cone(scope: Scope, value: Value) -> tuple[Op, ...]:
    """The ops that only `value` depends on, in graph order."""
    first = scope.maker(value)
    if first is None:
        return ()
    ops: set[Op] = {first}
    pending = [first]
    while pending and len(ops) < _LIMIT:
        for source in pending.pop().inputs:
            op = scope.maker(source)
            if op is None or op in ops or splits_rows(op):
                continue
            if all(r in ops for v in op.outputs for r in scope.graph.readers.get(v, ())):
                if not any(v in scope.results for v in op.outputs):
                    ops.add(op)
                    pending.append(op)
    return tuple(sorted(ops, key=scope.position.__getitem__))


def branch_ops(scope: Scope, value: Value) -> tuple[Op, ...]:
    """The ops of the branch that computes `value`: its cone.

    If the cone only multiplies a result by routing weights, and other slots read the same result,
    the cone of that result is included.
    """
    ops = cone(scope, value)
    if any(first_product(scope, op) for op in ops):
        return ops
    for source in (v for op in ops if op.name in MULTIPLY for v in op.inputs):
        readers = scope.graph.readers.get(source, ())
        if len(readers) > 1 and all(reader.name in MULTIPLY for reader in readers):
            shared = cone(scope, source)
            if any(first_product(scope, op) for op in shared):
                return (*ops, *shared)
    return ops


def splits_rows(op: Op) -> bool:
    """Whether the op splits rows by expert: its outputs are the rows of each expert."""
    return op.name == "aten.split_with_sizes.default" and bool(names_in(op))


def signature(scope: Scope, ops: Sequence[Op]) -> tuple[str, ...] | None:
    """The op names of a branch, which identify its kind; None if no product with weights is in
    it."""
    if not any(first_product(scope, op) for op in ops):
        return None
    return tuple(op.name for op in ops)


def first_product(scope: Scope, op: Op) -> bool:
    if op.name not in PRODUCTS:
        return False
    fixed = [v in scope.constants for v in op.inputs[:2]]
    return any(fixed) and not all(fixed)


def read_branch(scope: Scope, value: Value, ops: Sequence[Op]) -> Branch:
    """Raises NoMatch if the body of one expert cannot be read from the branch."""
    start = next((op for op in ops if first_product(scope, op)), None)
    if start is None:
        raise NoMatch(f"no routing weights are multiplied into {value.name}")
    reader = Reader(scope, BodyWriter(alone=True), frozenset(ops))
    reader.tokens(rows_behind(scope, start, ops))
    layout = reader.read(value)
    if layout is None or not layout.applied:
        why = reader.why.get(value) or next(iter(reader.why.values()), "it adds other values")
        raise NoMatch(f"the branch of {value.name} is not one expert's: {why}")
    body, _ = reader.body(layout)
    return Branch(value, tuple(ops), reader, layout, body, number_of(scope, ops))


def rows_behind(scope: Scope, start: Op, ops: Sequence[Op]) -> Value:
    """The rows of the branch: the widest float value that it reads before its first product."""
    activation = next(v for v in start.inputs[:2] if v not in scope.constants)
    inside = set(ops)
    outside = [v for op in ops for v in op.inputs if scope.maker(v) not in inside]
    path = scope.upstream([activation], outside)
    leaves = [activation] if scope.maker(activation) not in inside else scope.leaves(path, ())
    floats = [v for v in leaves if v.shape and v.dtype in FLOATS and v not in scope.constants]
    if not floats:
        raise NoMatch(f"{activation.name} is not computed from rows")
    return max(floats, key=lambda v: v.shape[-1] if isinstance(v.shape[-1], int) else 0)


def number_of(scope: Scope, ops: Sequence[Op]) -> int | None:
    """The expert id that the branch's mask is compared with. Without a comparison, it is the index
    of the mask in a stack of masks. (With a comparison, such an index is that of a slot.)"""
    for op in ops:
        if op.name == "aten.eq.Scalar" and op.inputs[0] not in scope.constants:
            if isinstance(op.attrs["other"], int):
                return op.attrs["other"]
    for op in ops:
        if op.inputs and op.inputs[0] in scope.constants and op.name != "aten.index.Tensor":
            continue
        if op.name == "aten.select.int" and op.inputs[0] not in scope.constants:
            return cast(int, op.attrs["index"])
        if op.name in ("aten.index.Tensor", "aten.eq.Tensor"):
            for value in op.inputs[1:]:
                content = scope.content(scope.source_of(value))
                if content is not None and content.numel() == 1:
                    return int(content)
    return None


def selected_by(op: Op) -> list[tuple[str, Value]]:
    """The values that select the rows of a link, each with its role."""
    if op.name == CHOOSES:
        return [("mask", op.inputs[0])]
    return [("order", index) for index in op.inputs[1:-1]] if op.name in ADDS else []


def named_by(scope: Scope, selects: Value) -> Op | None:
    """The op that contains the expert id of `selects`, a mask of rows or a list of rows."""
    mask = scope.source_of(selects, VIEWS | {"aten.slice.Tensor", "aten.nonzero.default"})
    op = scope.maker(mask)
    while op is not None and op.name not in CHOICES:
        if number_of(scope, [op]) is not None:
            return op
        op = scope.maker(op.inputs[0]) if op.inputs else None
    return None


@dataclass(frozen=True)
class Family:
    """The branches of all experts, in the order of the experts."""

    branches: tuple[Branch, ...]
    stacks: tuple[Recipe, ...]

    @property
    def first(self) -> Branch:
        return self.branches[0]


def family(scope: Scope, branches: Sequence[Branch]) -> Family:
    """The branches in the order of the experts. Raises NoMatch unless they are the experts 0 … n-1
    of one kind."""
    numbers = [b.number for b in branches]
    ordered = list(branches)
    if all(n is not None for n in numbers):
        if sorted(cast("list[int]", numbers)) != list(range(len(branches))):
            raise NoMatch(
                f"its branches are the experts {numbers}, expected 0 to {len(branches) - 1}"
            )
        ordered.sort(key=lambda b: cast(int, b.number))
    return Family(tuple(ordered), stack_recipes(scope, ordered))


def stack_recipes(scope: Scope, ordered: Sequence[Branch]) -> tuple[Recipe, ...]:
    """For each param of the body, a recipe for its stack over `ordered`.

    Raises NoMatch if the branches differ in more than their weights.
    """
    first = ordered[0]
    for branch in ordered[1:]:
        if branch.text != first.text:
            raise NoMatch("its experts differ in more than their weights")
    stacks = []
    for position, param in enumerate(first.body.params):
        picks = [b.reader.writer.picks[b.body.params[position]] for b in ordered]
        if any((p.axes, p.sizes) != (picks[0].axes, picks[0].sizes) for p in picks):
            raise NoMatch(f"its experts arrange the weight {param.name} differently")
        stacks.append(stacked(scope, [p.base for p in picks], picks[0].axes, picks[0].sizes))
    return tuple(stacks)


def stacked(
    scope: Scope, bases: Sequence[Value], axes: tuple[int, ...], sizes: tuple[Dim, ...]
) -> Recipe:
    """The stack [E, ..] of one weight per expert: the stack that all are slices of, or a new
    one."""
    root = common_root(scope, bases)

    def make(emit: RegionEmitter) -> Value:
        value = emit.old(root) if root else emit.stack([emit.old(b) for b in bases], 0)
        units = [i for i in range(len(value.shape) - 1) if i not in axes]
        value = emit.permute(value, (0, *(p + 1 for p in axes), *(u + 1 for u in units)))
        return emit.reshape(value, (len(bases), *sizes))

    return make


def common_root(scope: Scope, bases: Sequence[Value]) -> Value | None:
    """W if the bases are W[0], W[1], …, otherwise None."""
    roots = set()
    for number, base in enumerate(bases):
        op = scope.maker(scope.source_of(base, VIEWS))
        if op is None:
            return None
        if op.name == "aten.select.int":
            picked: Attr = op.attrs["index"] if op.attrs.get("dim", 0) == 0 else None
        elif op.name == "aten.index.Tensor" and op.attrs["indices"] == (Ref(1),):
            content = scope.content(scope.source_of(op.inputs[1]))
            picked = int(content) if content is not None and content.numel() == 1 else None
        else:
            return None
        if picked != number or op.inputs[0].shape[0] != len(bases):
            return None
        if op.inputs[0].shape[1:] != tuple(d for d in base.shape):
            return None
        roots.add(op.inputs[0])
    return roots.pop() if len(roots) == 1 else None
