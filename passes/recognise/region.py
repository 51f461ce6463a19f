"""Regions of a graph: the ops between a cut and a result, and the emitter of their replacement."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import sympy
import torch

from moec.dtypes import INDEX_DTYPES
from moec.errors import IRError, NoMatch
from moec.ir.graph import Attr, DType, Graph, Op, Ref, TensorType, Value
from moec.ir.index_uses import REQUIRE
from moec.ir.sizes.dims import Dim, product, symbols
from moec.ir.traits import CASTS, CHOICES, LIKES, THROUGH, VIEWS, is_elementwise, rounds_doubles
from moec.ir.value_ranges import ValueRanges
from moec.passes.core.rewrite import Builder, rebuild


def unlike(op: Op) -> Op:
    """The op without its input if it reads only the input's shape and dtype (zeros_like and
    others): an aten.full."""
    if op.name not in LIKES:
        return op
    (output,) = op.outputs
    fill = LIKES[op.name] if LIKES[op.name] is not None else op.attrs["fill_value"]
    attrs: dict[str, Attr] = {
        "size": output.shape,
        "fill_value": fill,
        "dtype": DType(output.dtype),
    }
    return Op("aten.full.default", (), op.outputs, attrs, None, op.origin, op.line)


@dataclass(frozen=True)
class Scope:
    """A graph with the indexes that recognisers need. `weights` gives the content of integer
    constants."""

    graph: Graph
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def position(self) -> Mapping[Op, int]:
        return {op: index for index, op in enumerate(self.graph.ops)}

    @cached_property
    def params(self) -> frozenset[Value]:
        return frozenset(self.graph.params)

    @cached_property
    def results(self) -> frozenset[Value]:
        return frozenset(self.graph.results)

    def content(self, value: Value) -> torch.Tensor | None:
        """The content of an integer param; None for other values."""
        fixed = value in self.params and value.dtype in INDEX_DTYPES
        return self.weights.get(value.name) if fixed else None

    @cached_property
    def constants(self) -> frozenset[Value]:
        """The params, and the values that are computed from params alone."""
        constants = set(self.graph.params)
        for op in self.graph.ops:
            if op.inputs and op.name.startswith("aten.") and constants.issuperset(op.inputs):
                constants.update(op.outputs)
        return frozenset(constants)

    @cached_property
    def ranges(self) -> ValueRanges:
        return ValueRanges(self.graph, self.weights)

    @cached_property
    def input_sizes(self) -> frozenset[str]:
        """The named sizes of the inputs; data decide all others."""
        return frozenset(
            name for v in self.graph.inputs for dim in v.shape for name in symbols(dim)
        )

    @cached_property
    def sizes(self) -> Mapping[str, tuple[Value, ...]]:
        """The results of each moec.size op, by the name of the data-dependent size that it
        binds."""
        return {
            str(op.attrs["name"]): op.outputs for op in self.graph.ops if op.name == "moec.size"
        }

    def maker(self, value: Value) -> Op | None:
        return self.graph.producers.get(value)

    def made_by(self, value: Value, *names: str) -> Op | None:
        op = self.maker(value)
        return op if op is not None and op.name in names else None

    def source_of(self, value: Value, names: Iterable[str] = VIEWS) -> Value:
        """The source of `value` before the ops `names`, but not before a rounding of float64. The
        default is ops that keep the elements and their order."""
        op = self.maker(value)
        while op is not None and op.name in names and not rounds_doubles(op):
            value = op.inputs[0]
            op = self.maker(value)
        return value

    def behind_casts(self, value: Value) -> Value:
        return self.source_of(value, VIEWS | CASTS)

    def upstream(self, results: Iterable[Value], stops: Iterable[Value] = ()) -> tuple[Op, ...]:
        """The ops that `results` depend on, back to `stops`, in the order of the graph."""
        visited, ops = set(stops), set()
        stack = list(results)
        while stack:
            value = stack.pop()
            if value in visited:
                continue
            visited.add(value)
            op = self.maker(value)
            if op is not None and op not in ops:
                ops.add(op)
                stack.extend(() if op.name in LIKES else op.inputs)
                if self.sizes:
                    stack.extend(v for n in names_in(op) for v in self.sizes.get(n, ()))
        return tuple(sorted(ops, key=self.position.__getitem__))

    def leaves(self, ops: Sequence[Op], stops: Iterable[Value] = ()) -> Iterator[Value]:
        """The values that `ops` read and none of them produces, except `stops`, each once."""
        produced = {value for op in ops for value in op.outputs} - set(stops)
        visited = set(stops)
        for op in ops:
            for value in () if op.name in LIKES else op.inputs:
                if value not in produced and value not in visited:
                    visited.add(value)
                    yield value

    def cut(self, results: Sequence[Value], stops: Sequence[Value]) -> Graph:
        """The graph with the inputs `stops`, from these and params to `results`.

        Raises NoMatch if it reads any other value.
        """
        ops = self.upstream(results, stops)
        others = [v for v in self.leaves(ops, stops) if v not in self.params]
        if others:
            raise NoMatch(f"it also reads {', '.join(v.name for v in others[:3])}")
        params = tuple(v for v in self.leaves(ops, stops) if v in self.params)
        return Graph(
            tuple(dict.fromkeys(stops)),
            params,
            tuple(_rename_cut(unlike(op), stops) for op in ops),
            tuple(results),
            (),
            self.graph.bounds,
        )


def _rename_cut(op: Op, cut: Container[Value]) -> Op:
    """The op of which a region reads other results than those it begins at, as the values of a
    top-k beside its indices. A result in the cut is renamed: it would replace the input."""
    if not any(value in cut for value in op.outputs):
        return op
    outputs = (Value(f"{v.name}.unread", v.type) if v in cut else v for v in op.outputs)
    return replace(op, outputs=tuple(outputs))


def names_in(op: Op) -> set[str]:
    """The named sizes in an op's attributes."""
    names: set[str] = set()
    pending: list[Attr] = list(op.attrs.values())
    while pending:
        value = pending.pop()
        if isinstance(value, tuple):
            pending.extend(value)
        elif isinstance(value, sympy.Expr):
            names |= symbols(value)
    return names


@dataclass(frozen=True)
class RegionEmitter:
    """Emits the ops that replace a region. `new` maps values of the old graph to those of the new
    one."""

    builder: Builder
    new: Mapping[Value, Value]
    like: Op

    def old(self, value: Value) -> Value:
        return self.new.get(value, value)

    def __call__(
        self,
        name: str,
        inputs: Sequence[Value],
        types: Sequence[TensorType] | None = None,
        *,
        attrs: Mapping[str, Attr] | None = None,
        body: Graph | None = None,
        named: str | None = None,
    ) -> tuple[Value, ...]:
        return self.builder.emit(
            name, inputs, types, like=self.like, attrs=attrs, body=body, named=named
        )

    def reshape(self, value: Value, shape: Sequence[Dim]) -> Value:
        return self.builder.reshape(value, shape, like=self.like)

    def expand(self, value: Value, shape: Sequence[Dim]) -> Value:
        attrs: dict[str, Attr] = {"size": tuple(shape)}
        expanded = TensorType(value.dtype, tuple(shape))
        return self("aten.expand.default", [value], [expanded], attrs=attrs)[0]

    def rows(self, value: Value) -> Value:
        """Reshapes [.., D] to [T, D]."""
        return self.reshape(value, (product(value.shape[:-1]), value.shape[-1]))

    def cast(self, value: Value, dtype: str) -> Value:
        return self.builder.cast(value, dtype, like=self.like)

    def permute(self, value: Value, dims: Sequence[int]) -> Value:
        return self.builder.permute(value, dims, like=self.like)

    def stack(self, values: Sequence[Value], axis: int) -> Value:
        first = values[0]
        shape = list(first.shape)
        shape.insert(axis, len(values))
        target = TensorType(first.dtype, tuple(shape))
        attrs: dict[str, Attr] = {"tensors": tuple(Ref(i) for i in range(len(values)))}
        if axis:
            attrs["dim"] = axis
        return self("aten.stack.default", values, [target], attrs=attrs)[0]


Recipe = Callable[[RegionEmitter], Value]
"""Emits one value of the new graph, computed from values of the old graph."""


def replacement(
    scope: Scope, at: Op, cut: Sequence[Value], emit: Callable[[RegionEmitter], Value]
) -> Graph:
    """The ops that `emit` emits in place of `at`, as a separate graph with the inputs `cut`.

    Values of the old graph that these ops read are computed from the cut, as in the old graph.
    Raises NoMatch if the ops cannot be built, or read a value that does not follow from the cut.
    """
    empty = Graph(tuple(cut), scope.graph.params, (), (), (), scope.graph.bounds)
    builder = Builder(empty)
    builder.names |= {value.name for value in scope.graph.values()}
    try:
        y = emit(RegionEmitter(builder, {}, at))
    except IRError as error:
        raise NoMatch(f"the block cannot be built: {error}") from None
    fresh = {value for op in builder.ops for value in op.outputs}
    read = [v for op in builder.ops for v in op.inputs if v not in fresh]
    before = scope.upstream([v for v in read if v not in cut], cut)
    ops = (*(_rename_cut(unlike(op), cut) for op in before), *builder.ops)
    others = [v for v in scope.leaves(ops, cut) if v not in scope.params]
    if others:
        raise NoMatch(f"its routing reads {', '.join(v.name for v in others[:3])}")
    params = tuple(v for v in scope.leaves(ops, cut))
    return Graph(tuple(cut), params, ops, (y,), (), scope.graph.bounds)


def replaced(graph: Graph, emits: Mapping[Op, Recipe]) -> Graph:
    """The graph in which each op of `emits`, which has one result, is replaced by what is emitted
    for it."""
    if not emits:
        return graph
    builder = Builder(graph)
    new: dict[Value, Value] = {}
    for old in graph.ops:
        if old in emits:
            new[old.outputs[0]] = emits[old](RegionEmitter(builder, new, old))
        else:
            builder.append(replace(old, inputs=tuple(new.get(v, v) for v in old.inputs)))
    return rebuild(graph, builder.ops, new)


ROUTING = frozenset(
    {
        "aten.all.dim",
        "aten.any.dim",
        "aten.arange.default",
        "aten.arange.start",
        "aten.arange.start_step",
        "aten.argmax.default",
        "aten.amax.default",
        "aten.bmm.default",
        "aten.cat.default",
        "aten.cumsum.default",
        "aten.empty_like.default",
        "aten.expand.default",
        "aten.full.default",
        "aten.full_like.default",
        "aten.gather.default",
        "aten.index.Tensor",
        "aten.index_select.default",
        "aten.linalg_vector_norm.default",
        "aten.max.dim",
        "aten.nonzero.default",
        "aten.ones_like.default",
        "aten.permute.default",
        "aten.scalar_tensor.default",
        "aten.scatter.src",
        "aten.scatter.value",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.softmax.int",
        "aten._softmax.default",
        "aten.sort.default",
        "aten.sort.stable",
        "aten.split_with_sizes.default",
        "aten.stack.default",
        "aten.sum.dim_IntList",
        "aten.topk.default",
        "aten.zeros_like.default",
        *VIEWS,
        *CASTS,
    }
)
"""The ops that routers consist of, besides element-wise ops."""


def is_routing(op: Op) -> bool:
    return op.name in ROUTING or op.name == REQUIRE or is_elementwise(op.name)


def routing_behind(
    scope: Scope, values: Iterable[Value], most: int, stops: Container[str] = ()
) -> Iterator[Value]:
    """`values` and their sources through routing ops, nearest first, until `most` values were
    visited.

    The inputs of ops named in `stops` are not followed.
    """
    waiting = list(values)
    visited = set(waiting)
    while waiting and len(visited) < most:
        value = waiting.pop(0)
        yield value
        op = scope.maker(value)
        if op is None or not is_routing(op) or op.name in stops:
            continue
        for source in op.inputs:
            if source not in visited:
                visited.add(source)
                waiting.append(source)


def choices(scope: Scope, values: Iterable[Value], limit: int = 400) -> tuple[Op, ...]:
    """The ops that choose experts for `values`, reached through routing ops only, in graph
    order."""
    stack, visited = list(values), set(values)
    choice_ops: dict[Op, None] = {}
    while stack and len(visited) < limit:
        op = scope.maker(stack.pop())
        if op is None or not is_routing(op):
            continue
        if op.name in CHOICES:
            choice_ops[op] = None
        for value in op.inputs:
            if value not in visited:
                visited.add(value)
                stack.append(value)
    return tuple(sorted(choice_ops, key=scope.position.__getitem__))


def chooses(scope: Scope, value: Value) -> bool:
    return bool(choices(scope, [value]))


def sets_zeros(scope: Scope, value: Value) -> bool:
    """Whether a condition sets elements of a value to zero: experts with these weights have no work
    to do."""
    op = scope.maker(value)
    while op is not None and op.name in THROUGH | {"aten.slice.Tensor", "aten.select.int"}:
        value = op.inputs[0]
        op = scope.maker(value)
    if op is None:
        return False
    if op.name == "aten.mul.Tensor":
        return any(_is_condition(scope, operand) for operand in op.inputs)
    return op.name in ("aten.where.self", "aten.where.ScalarOther", "aten.masked_fill.Scalar")


def _is_condition(scope: Scope, value: Value) -> bool:
    op = scope.maker(value)
    cast = op is not None and op.name in CASTS and op.inputs[0].dtype == "bool"
    return value.dtype == "bool" or cast
