"""Experts that are all used and weighted by a softmax become moe.mixture, whatever they compute.

    a = aten.softmax(logits)                      a = aten.softmax(logits)
    y = a[:, 0] * detect(x)                       y = moe.mixture(a, x, weights…) {
      + a[:, 1] * segment(x) + …          ->         o0 = detect(x); o1 = segment(x); … }

One node holds experts of different graphs and inner shapes (Astrea, arXiv 2503.09445). Ops that all
experts read, and ops that others read too, stay outside the node. Ops are moved, never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, Stage, Value
from moec.ir.traits import VIEWS
from moec.passes.core.rewrite import Builder, rebuild
from moec.passes.core.runner import Log, Pass
from moec.passes.recognise.region import Scope

ADD, MULTIPLY, SOFTMAX = "aten.add.Tensor", "aten.mul.Tensor", "aten.softmax.int"
FORM = "all experts, weighed"


@dataclass(frozen=True)
class RecogniseMixtures(Pass):
    """Experts of any kind that are weighted by a softmax become one node."""

    name: ClassVar[str] = "recognise-mixtures"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        graph = program.graph
        for op in graph.ops:
            scope = Scope(graph, program.weights)
            if op not in graph.ops or op.name != ADD or adds_on(scope, op):
                continue
            terms = summed(scope, op)
            shares = shares_of(scope, terms)
            if shares is None:
                continue
            try:
                replaced = with_mixture(scope, op, terms, shares)
            except NoMatch as why:
                log.decline(op.origin or op.outputs[0].name, str(why))
                continue
            if log.spend(f"mixture {op}"):
                graph = replaced
        return replace(program, graph=graph)


@dataclass(frozen=True)
class Term:
    """One term of a sum. If it has a weight, it is `expert` of the mixture times `weight`."""

    value: Value
    weight: Op | None = None  # selects one column of a softmax
    expert: Value | None = None

    @property
    def number(self) -> int:
        assert self.weight is not None
        index = self.weight.attrs.get("index", self.weight.attrs.get("start", 0))
        assert isinstance(index, int)
        return index


def adds_on(scope: Scope, op: Op) -> bool:
    """Whether the result of `op` is only read by another sum."""
    readers = scope.graph.readers.get(op.outputs[0], ())
    return op.outputs[0] not in scope.results and [r.name for r in readers] == [ADD]


def summed(scope: Scope, op: Op) -> list[Term]:
    """The terms of nested sums, in order. Zeros at the start of a sum are left out."""
    terms: list[Term] = []
    waiting = list(op.inputs)
    while waiting:
        value = waiting.pop(0)
        inner = scope.made_by(value, ADD)
        if inner is not None and _sums(inner) and adds_on(scope, inner):
            waiting = [*inner.inputs, *waiting]
        elif not _is_zero(scope, value):
            terms.append(_term(scope, value))
    return terms


def _sums(op: Op) -> bool:
    """Whether an addition is of two values, or of one value and 0, as in the first step of Python's
    sum."""
    if len(op.inputs) == 1 and op.attrs.get("other", op.attrs.get("self")) != 0:
        return False
    return "alpha" not in op.attrs


def _term(scope: Scope, value: Value) -> Term:
    product = scope.made_by(value, MULTIPLY)
    if product is not None and len(product.inputs) == 2:
        for weight, expert in (product.inputs, product.inputs[::-1]):
            picked = scope.made_by(
                scope.source_of(weight, VIEWS), "aten.select.int", "aten.slice.Tensor"
            )
            if picked is not None and _one_share(scope, picked) and expert.type == value.type:
                return Term(value, picked, expert)
    return Term(value)


def _one_share(scope: Scope, picked: Op) -> bool:
    """Whether `picked` is one column of a softmax over the last axis."""
    shares, last = picked.inputs[0], len(picked.inputs[0].shape) - 1
    soft = scope.made_by(shares, SOFTMAX)
    over = soft is not None and soft.attrs["dim"] in (-1, last)
    one = picked.name == "aten.select.int" or picked.outputs[0].shape[-1] == 1
    return over and one and picked.attrs.get("dim", 0) in (-1, last)


def _is_zero(scope: Scope, value: Value) -> bool:
    content = scope.content(value)
    if content is not None:
        return content.numel() < 1 << 16 and not content.any()
    op = scope.made_by(value, "aten.full.default", "aten.full_like.default", "aten.zeros.default")
    return op is not None and op.attrs.get("fill_value", 0) == 0


def shares_of(scope: Scope, terms: Sequence[Term]) -> Value | None:
    """The softmax [.., E] of which each column weights exactly one term; None if there is none."""
    weights = [term.weight for term in terms if term.weight is not None]
    sources = {weight.inputs[0] for weight in weights}
    if len(weights) < 2 or len(sources) != 1:
        return None
    (shares,) = sources
    numbers = sorted(term.number for term in terms if term.weight is not None)
    return (
        shares
        if numbers == list(range(len(numbers))) and shares.shape[-1] == len(numbers)
        else None
    )


def with_mixture(scope: Scope, at: Op, terms: Sequence[Term], shares: Value) -> Graph:
    """The graph with the sum at `at` replaced by a mixture. Raises NoMatch if the experts cannot be
    separated from the rest of the graph."""
    graph = scope.graph
    weighed = sorted((term for term in terms if term.weight is not None), key=lambda t: t.number)
    experts = [term.expert for term in weighed if term.expert is not None]
    if len({value.type for value in experts}) > 1:
        raise NoMatch("its experts return values of different types")
    if shares.shape[:-1] != experts[0].shape[: len(shares.shape) - 1]:
        raise NoMatch(f"its weights {shares} are not one for each {experts[0].type}")
    products = {graph.producers[term.value] for term in weighed}
    inside = own_ops(scope, experts, products, shares)
    if any(op.name.startswith("moe.") for op in inside):
        raise NoMatch("one of its experts is itself an MoE block")
    if not all(graph.producers.get(value) in inside for value in experts):
        raise NoMatch("the output of one of its experts is read by other ops too")
    leaves = tuple(dict.fromkeys(scope.leaves(tuple(op for op in graph.ops if op in inside))))
    inputs = tuple(value for value in leaves if value not in graph.params)
    params = tuple(value for value in leaves if value in graph.params)
    copies = {value: Value(value.name, value.type) for value in (*inputs, *params)}
    body_ops: list[Op] = []
    for op in (op for op in graph.ops if op in inside):
        if missing := next((v for v in op.inputs if v not in copies), None):
            raise NoMatch(f"one of its experts reads the shape of {missing.name} alone")
        outputs = tuple(Value(value.name, value.type) for value in op.outputs)
        body_ops.append(replace(op, inputs=tuple(copies[v] for v in op.inputs), outputs=outputs))
        copies |= dict(zip(op.outputs, outputs, strict=True))
    body = Graph(
        tuple(copies[v] for v in inputs), tuple(copies[v] for v in params), tuple(body_ops),
        tuple(copies[v] for v in experts), (), graph.bounds, "experts",
    )  # fmt: skip
    builder = Builder(graph)
    new: dict[Value, Value] = {}
    for op in graph.ops:
        if op is not at:
            if op not in inside:
                builder.append(replace(op, inputs=tuple(new.get(v, v) for v in op.inputs)))
            continue
        (total,) = builder.emit(
            "moe.mixture", [shares, *inputs, *params], like=op, attrs={"form": FORM}, body=body
        )
        for term in terms:
            if term.weight is None:
                (total,) = builder.emit(ADD, [total, term.value], [op.outputs[0].type], like=op)
        new[op.outputs[0]] = total
    return rebuild(graph, builder.ops, new)


def own_ops(scope: Scope, experts: Sequence[Value], products: set[Op], shares: Value) -> set[Op]:
    """The ops that at least one expert needs, but not all, nor the `shares`, and that nothing else
    reads. `products` are the products with the weights."""
    graph = scope.graph
    upstream = [set(scope.upstream([value])) for value in experts]
    common = set.intersection(*upstream)
    either = set.union(*upstream) - common - set(scope.upstream([shares]))
    inside: set[Op] = set()
    for op in reversed(graph.ops):
        if op not in either or op.name == "moec.size":
            continue
        readers = {reader for value in op.outputs for reader in graph.readers.get(value, ())}
        free = not any(value in scope.results for value in op.outputs)
        if free and readers and readers <= inside | products:
            inside.add(op)
    return inside
