"""Rewriting: a rule is tried at every op of a graph, in order, while the next graph is built.

A rule gets an op whose inputs already belong to the new graph, looks up producers in the
`Builder`, emits a replacement, and returns the values that replace the op's outputs, or None. Rules
never delete: dead ops are dropped at the end, so a match whose inner values have other readers
stays correct.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy

from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Graph, Op, State, TensorType, Value
from moec.ir.ops import OPS
from moec.ir.sizes.dims import Dim, symbols
from moec.passes.core.runner import Log

_NUMBER = re.compile(r"(_\d+)+$")

Rule = Callable[[Op, "Builder"], Sequence[Value] | None]


class Builder:
    """The next graph under construction."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.params = list(graph.params)
        self.ops: list[Op] = []
        self.producers: dict[Value, Op] = {}
        self.names = {value.name for value in graph.values()}
        self.counts: dict[str, int] = {}

    def fresh(self, name: str) -> str:
        """`name` if it is free, else its stem with the first free number: `name_2` …"""
        if name in self.names:
            stem = _NUMBER.sub("", name)
            count = self.counts.get(stem, 1) + 1
            while f"{stem}_{count}" in self.names:
                count += 1
            self.counts[stem] = count
            name = f"{stem}_{count}"
        self.names.add(name)
        return name

    def append(self, op: Op) -> tuple[Value, ...]:
        self.ops.append(op)
        self.producers |= dict.fromkeys(op.outputs, op)
        return op.outputs

    def param(self, name: str, type: TensorType) -> Value:
        value = Value(self.fresh(name), type)
        self.params.append(value)
        return value

    def emit(
        self,
        name: str,
        inputs: Sequence[Value],
        types: Sequence[TensorType] | None = None,
        *,
        like: Op,
        attrs: Mapping[str, Attr] | None = None,
        body: Graph | None = None,
        named: str | Sequence[str] | None = None,
    ) -> tuple[Value, ...]:
        """Append an op in place of `like`: with its origin, line, and output names from its.

        `types` may be left out for moec's own ops, whose type rule gives them; `named` is one
        name, or one for each output.
        """
        draft = Op(name, tuple(inputs), (), dict(attrs or {}), body, like.origin, like.line)
        if types is None:
            types = OPS[name].infer(draft)
        stem = named or like.outputs[0].name
        names = [stem] * len(types) if isinstance(stem, str) else stem
        outputs = tuple(Value(self.fresh(n), t) for n, t in zip(names, types, strict=True))
        return self.append(replace(draft, outputs=outputs))

    def reshape(
        self, x: Value, shape: Sequence[Dim], *, like: Op, named: str | None = None
    ) -> Value:
        """x with another shape; x itself if it has that shape."""
        target = TensorType(x.dtype, tuple(shape))
        if target == x.type:
            return x
        attrs = {"shape": target.shape}
        return self.emit(
            "aten.reshape.default", [x], [target], like=like, attrs=attrs, named=named
        )[0]

    def permute(
        self, x: Value, dims: Sequence[int], *, like: Op, named: str | None = None
    ) -> Value:
        """x with its axes in the order `dims`; x itself if that is theirs."""
        if list(dims) == list(range(len(x.shape))):
            return x
        target = TensorType(x.dtype, tuple(x.shape[dim] for dim in dims))
        attrs = {"dims": tuple(dims)}
        return self.emit(
            "aten.permute.default", [x], [target], like=like, attrs=attrs, named=named
        )[0]

    def cast(self, x: Value, dtype: str, *, like: Op, named: str | None = None) -> Value:
        """x cast to a dtype; x itself if it has that dtype."""
        if x.dtype == dtype:
            return x
        target, attrs = TensorType(dtype, x.shape), {"dtype": DType(dtype)}
        return self.emit(
            "aten._to_copy.default", [x], [target], like=like, attrs=attrs, named=named
        )[0]


def rewrite(graph: Graph, rule: Rule, log: Log) -> Graph:
    """Apply `rule` at every op, in order, as far as fuel goes.

    A rule that raises NoMatch declines: its reason goes into the log.
    """
    builder = Builder(graph)
    new: dict[Value, Value] = {value: value for value in (*graph.inputs, *graph.params)}
    for old in graph.ops:
        op = replace(old, inputs=tuple(new[v] for v in old.inputs))
        mark = len(builder.ops)
        results: Sequence[Value] | None = None
        try:
            results = rule(op, builder)
        except NoMatch as why:
            log.decline(op.origin or op.outputs[0].name, str(why))
        if results is not None and not log.spend(str(op)):
            results = None
        if results is None:
            del builder.ops[mark:]
            results = builder.append(op)
        new |= dict(zip(old.outputs, results, strict=True))
    return rebuild(graph, builder.ops, new, params=builder.params)


def rebuild(
    graph: Graph,
    ops: Sequence[Op],
    new: Mapping[Value, Value],
    *,
    params: Sequence[Value] | None = None,
) -> Graph:
    """`graph` with `ops` for its ops and results mapped by `new`, without dead ops and params."""
    outputs = tuple(new.get(v, v) for v in graph.outputs)
    states = tuple(State(s.before, new.get(s.after, s.after)) for s in graph.states)
    return drop_dead(
        replace(
            graph,
            ops=tuple(ops),
            outputs=outputs,
            states=states,
            params=graph.params if params is None else tuple(params),
        )
    )


def sizes_in(op: Op) -> set[str]:
    """The named sizes in an op's results and attributes."""
    names = {name for value in op.outputs for dim in value.shape for name in symbols(dim)}

    def visit(attr: Attr) -> None:
        if isinstance(attr, tuple):
            for item in attr:
                visit(item)
        elif isinstance(attr, sympy.Expr):
            names.update(symbols(attr))

    for attr in op.attrs.values():
        visit(attr)
    return names


def drop_dead(graph: Graph) -> Graph:
    """The graph without ops and params that no output depends on. All inputs stay."""
    needed = set(graph.results)
    reads_sizes = any(op.name == "moec.size" for op in graph.ops)
    sizes: set[str] = set()
    ops: list[Op] = []
    for op in reversed(graph.ops):
        if needed.intersection(op.outputs) or op.attrs.get("name") in sizes:
            ops.append(op)
            needed.update(op.inputs)
            if reads_sizes:
                sizes |= sizes_in(op)
    params = tuple(p for p in graph.params if p in needed)
    return replace(graph, ops=tuple(reversed(ops)), params=params)
