"""Gates at two levels become moe.hierarchy: outer weights over groups, inner weights within each
group.

    a = aten.softmax(c[:, 0:6]) * r[:, 0:6]
    b = aten.softmax(c[:, 6:9]) * r[:, 6:9]        ->  y = moe.hierarchy(r, c, w) <groups=(6, 3)>
    y = w[:, 0] * a.sum(-1) + w[:, 1] * b.sum(-1)

The experts' results are columns of one value r, such as the rewards of a reward model (MJ-VIDEO,
arXiv 2502.01719), or the output of one layer. A factor common to all inner softmaxes is applied
after the node. Experts that are separate networks become blocks instead
(`moec.passes.recognise.forms.branches.levels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

from moec.errors import NoMatch
from moec.ir.graph import Attr, Op, Program, Stage, TensorType, Value
from moec.passes.core.runner import Log, Pass
from moec.passes.proof.input_generators import InputKind
from moec.passes.proof.prove import Prover
from moec.passes.recognise.forms.soft.mixture import ADD, MULTIPLY, SOFTMAX, adds_on, summed
from moec.passes.recognise.region import RegionEmitter, Scope, replaced, replacement

SUM = "aten.sum.dim_IntList"


@dataclass(frozen=True)
class RecogniseHierarchies(Pass):
    """Sums weighted by gates at two levels become one node."""

    name: ClassVar[str] = "recognise-hierarchies"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        scope, prover = Scope(program.graph, program.weights), Prover(program.weights)
        nodes: dict[Op, Hierarchy] = {}
        for op in program.graph.ops:
            if op.name != ADD or adds_on(scope, op):
                continue
            groups = [read_group(scope, term.value) for term in summed(scope, op)]
            if len(groups) < 2 or not all(groups):
                continue
            try:
                node = joined(cast("list[GatedTerm]", groups))
                region = scope.cut(op.outputs, node.cut)
                after = replacement(scope, op, node.cut, partial(emit, node, op.outputs[0]))
                prover.prove(region, after, {node.logits: InputKind.LOGITS})
            except NoMatch as why:
                log.decline(op.origin or op.outputs[0].name, f"gates at two levels: {why}")
                continue
            if log.spend(f"hierarchy {op}"):
                nodes[op] = node
        emits = {op: partial(emit, node, op.outputs[0]) for op, node in nodes.items()}
        return replace(program, graph=replaced(program.graph, emits))


@dataclass(frozen=True)
class Columns:
    """A range of columns of a value's last axis."""

    value: Value
    start: int
    end: int


@dataclass(frozen=True)
class GatedTerm:
    """One term of the sum: the column of the outer gate, and the columns of logits and values of
    the inner one. `scale` multiplies the inner softmax."""

    weight: Columns
    logits: Columns
    values: Columns
    scale: Value | None


@dataclass(frozen=True)
class Hierarchy:
    values: Value
    logits: Value
    weights: Value
    scale: Value | None
    groups: tuple[int, ...]

    @property
    def cut(self) -> tuple[Value, ...]:
        scale = () if self.scale is None else (self.scale,)
        return (self.values, self.logits, self.weights, *scale)


def joined(groups: Sequence[GatedTerm]) -> Hierarchy:
    """All groups as one node. Raises NoMatch unless they partition the columns of one value."""
    first, ordered = groups[0], sorted(groups, key=lambda group: group.values.start)
    for name in ("weight", "logits", "values"):
        parts = [cast(Columns, getattr(group, name)) for group in ordered]
        values = {part.value for part in parts}
        if len(values) > 1:
            raise NoMatch(f"its {name} are of {', '.join(sorted(map(str, values)))}, not of one")
        ends = [0, *(part.end for part in parts)]
        if [part.start for part in parts] != ends[:-1] or ends[-1] != parts[0].value.shape[-1]:
            raise NoMatch(
                f"its groups are not all columns of {parts[0].value}, each once, in order"
            )
    if any(group.logits.end != group.values.end for group in ordered):
        raise NoMatch("a group's logits are not those of its values")
    if any(group.scale is not first.scale for group in ordered):
        raise NoMatch("its groups are multiplied by different values")
    sizes = tuple(group.values.end - group.values.start for group in ordered)
    return Hierarchy(first.values.value, first.logits.value, first.weight.value, first.scale, sizes)


def read_group(scope: Scope, term: Value) -> GatedTerm | None:
    """`term` read as weight * (scale * softmax(logits) * values).sum(-1), or None if it has another
    form."""
    for weight, inner in factors(scope, term):
        column = columns(scope, scope.source_of(weight))
        total = scope.made_by(scope.source_of(inner), SUM)
        if column is None or column.end - column.start != 1 or total is None:
            continue
        if not _over_last(total):
            continue
        for shares, part in factors(scope, total.inputs[0]):
            values = columns(scope, part)
            logits, scale = inner_softmax(scope, shares)
            if values is not None and logits is not None:
                return GatedTerm(column, logits, values, scale)
    return None


def inner_softmax(scope: Scope, shares: Value) -> tuple[Columns | None, Value | None]:
    """The logits of a softmax over the last axis, and the factor that multiplies it."""
    options: list[tuple[Value, Value | None]] = [(shares, None)]
    options += [(a, b) for a, b in factors(scope, shares) if not b.shape]
    for value, scale in options:
        soft = scope.made_by(value, SOFTMAX)
        if soft is not None and soft.attrs["dim"] in (-1, len(value.shape) - 1):
            return columns(scope, soft.inputs[0]), scale
    return None, None


def factors(scope: Scope, value: Value) -> Iterator[tuple[Value, Value]]:
    """The two operands of a product, in both orders."""
    product = scope.made_by(value, MULTIPLY)
    if product is not None and len(product.inputs) == 2:
        yield product.inputs[0], product.inputs[1]
        yield product.inputs[1], product.inputs[0]


def columns(scope: Scope, value: Value) -> Columns | None:
    """The columns of another value's last axis that `value` is a slice of."""
    op = scope.made_by(value, "aten.slice.Tensor", "aten.select.int")
    if op is None or op.attrs.get("dim", 0) not in (-1, len(op.inputs[0].shape) - 1):
        return None
    source, size = op.inputs[0], op.inputs[0].shape[-1]
    start = op.attrs.get("index", op.attrs.get("start") or 0)
    if not isinstance(size, int) or not isinstance(start, int) or op.attrs.get("step", 1) != 1:
        return None
    start += size if start < 0 else 0
    count = 1 if op.name == "aten.select.int" else op.outputs[0].shape[-1]
    return Columns(source, start, start + count) if isinstance(count, int) else None


def _over_last(total: Op) -> bool:
    return total.attrs["dim"] in ((-1,), (len(total.inputs[0].shape) - 1,))


def emit(node: Hierarchy, output: Value, emit: RegionEmitter) -> Value:
    """Emits the node, and reshapes its result to the shape of the sum."""
    values, logits, weights = map(emit.old, (node.values, node.logits, node.weights))
    attrs: dict[str, Attr] = {"groups": node.groups}
    (y,) = emit("moe.hierarchy", [values, logits, weights], attrs=attrs, named=output.name)
    if node.scale is not None:
        scaled = TensorType(y.dtype, y.shape)
        (y,) = emit("aten.mul.Tensor", [y, emit.old(node.scale)], [scaled])
    return emit.reshape(y, output.shape)
