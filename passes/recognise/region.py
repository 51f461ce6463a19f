"""Regions of a graph: what lies between a cut and a result, and how its replacement is emitted."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import sympy
import torch

from moec.errors import NoMatch
from moec.ir.aten import overload
from moec.ir.dims import Dim, product, symbols
from moec.ir.graph import Attr, DType, Graph, Op, TensorType, Value
from moec.passes.core.rewrite import Builder
from moec.passes.proof.branch_coverage import CHOICES

VIEWS = frozenset(
    {
        "aten.reshape.default",
        "aten.view.default",
        "aten._unsafe_view.default",
        "aten.squeeze.dims",
        "aten.squeeze.dim",
        "aten.squeeze.default",
        "aten.unsqueeze.default",
        "aten.clone.default",
        "aten.alias.default",
        "aten.detach.default",
    }
)
"""Ops that keep the elements and their row-major order."""

CASTS = frozenset({"aten._to_copy.default", "aten.to.dtype"})
THROUGH = VIEWS | CASTS | {"aten.expand.default", "aten.permute.default"}
"""Ops behind which the same elements stand, perhaps more than once or in another dtype."""


SHAPED = {
    "aten.full_like.default": None,
    "aten.zeros_like.default": 0,
    "aten.ones_like.default": 1,
    "aten.empty_like.default": 0,
}
"""Ops that take no more than a shape from their input, and what they fill it with."""


def unlike(op: Op) -> Op:
    """The op without its input where it reads nothing but the shape."""
    if op.name not in SHAPED:
        return op
    (made,) = op.outputs
    fill = SHAPED[op.name] if SHAPED[op.name] is not None else op.attrs["fill_value"]
    attrs: dict[str, Attr] = {"size": made.shape, "fill_value": fill, "dtype": DType(made.dtype)}
    return Op("aten.full.default", (), op.outputs, attrs, None, op.origin)


@dataclass(frozen=True)
class Scope:
    """A graph as a recogniser sees it. `weights` tell what integer constants hold."""

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
        """What an integer param holds."""
        fixed = value in self.params and value.dtype in ("i64", "i32")
        return self.weights.get(value.name) if fixed else None

    @cached_property
    def constants(self) -> frozenset[Value]:
        """Params, and what is made of params alone."""
        found = set(self.graph.params)
        for op in self.graph.ops:
            if op.inputs and op.name.startswith("aten.") and found.issuperset(op.inputs):
                found.update(op.outputs)
        return frozenset(found)

    @cached_property
    def sizes(self) -> Mapping[str, tuple[Value, ...]]:
        """The values that bind sizes which depend on data."""
        return {
            str(op.attrs["name"]): op.outputs for op in self.graph.ops if op.name == "moec.size"
        }

    def maker(self, value: Value) -> Op | None:
        return self.graph.producers.get(value)

    def made_by(self, value: Value, *names: str) -> Op | None:
        op = self.maker(value)
        return op if op is not None and op.name in names else None

    def behind(self, value: Value, names: Iterable[str] = VIEWS) -> Value:
        """What `value` is made from, seen through ops that only rename its elements."""
        op = self.maker(value)
        while op is not None and op.name in names:
            value = op.inputs[0]
            op = self.maker(value)
        return value

    def behind_casts(self, value: Value) -> Value:
        return self.behind(value, VIEWS | CASTS)

    def upstream(self, results: Iterable[Value], stops: Iterable[Value] = ()) -> tuple[Op, ...]:
        """The ops that `results` need, down to `stops`, in the order of the graph."""
        seen, found = set(stops), set()
        stack = list(results)
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            op = self.maker(value)
            if op is not None and op not in found:
                found.add(op)
                stack.extend(() if op.name in SHAPED else op.inputs)
                if self.sizes:
                    stack.extend(v for n in names_in(op) for v in self.sizes.get(n, ()))
        return tuple(sorted(found, key=self.position.__getitem__))

    def leaves(self, ops: Sequence[Op], stops: Iterable[Value] = ()) -> Iterator[Value]:
        """What `ops` read and none of them makes, `stops` left out, each once."""
        made = {value for op in ops for value in op.outputs} - set(stops)
        seen = set(stops)
        for op in ops:
            for value in () if op.name in SHAPED else op.inputs:
                if value not in made and value not in seen:
                    seen.add(value)
                    yield value

    def cut(self, results: Sequence[Value], stops: Sequence[Value]) -> Graph:
        """The graph from `stops` (its inputs) and params to `results`.

        Raises NoMatch where it reads anything else.
        """
        ops = self.upstream(results, stops)
        others = [v for v in self.leaves(ops, stops) if v not in self.params]
        if others:
            raise NoMatch(f"it also reads {', '.join(v.name for v in others[:3])}")
        params = tuple(v for v in self.leaves(ops, stops) if v in self.params)
        return Graph(
            tuple(dict.fromkeys(stops)),
            params,
            tuple(map(unlike, ops)),
            tuple(results),
            (),
            self.graph.bounds,
        )


def names_in(op: Op) -> set[str]:
    """The named sizes of an op's attributes."""
    found: set[str] = set()
    pending: list[Attr] = list(op.attrs.values())
    while pending:
        value = pending.pop()
        if isinstance(value, tuple):
            pending.extend(value)
        elif isinstance(value, sympy.Expr):
            found |= symbols(value)
    return found


@dataclass(frozen=True)
class Emitter:
    """Emits what stands for a region. `new` maps values of the old graph to the next one."""

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
        wanted = TensorType(value.dtype, tuple(shape))
        if wanted == value.type:
            return value
        return self("aten.reshape.default", [value], [wanted], attrs={"shape": wanted.shape})[0]

    def rows(self, value: Value) -> Value:
        """[.., D] as [T, D]."""
        return self.reshape(value, (product(value.shape[:-1]), value.shape[-1]))

    def cast(self, value: Value, dtype: str) -> Value:
        if value.dtype == dtype:
            return value
        wanted = TensorType(dtype, value.shape)
        return self("aten._to_copy.default", [value], [wanted], attrs={"dtype": DType(dtype)})[0]

    def permute(self, value: Value, dims: Sequence[int]) -> Value:
        if list(dims) == list(range(len(value.shape))):
            return value
        wanted = TensorType(value.dtype, tuple(value.shape[d] for d in dims))
        return self("aten.permute.default", [value], [wanted], attrs={"dims": tuple(dims)})[0]

    def stack(self, values: Sequence[Value], axis: int) -> Value:
        from moec.ir.graph import Ref

        first = values[0]
        shape = list(first.shape)
        shape.insert(axis, len(values))
        wanted = TensorType(first.dtype, tuple(shape))
        attrs: dict[str, Attr] = {"tensors": tuple(Ref(i) for i in range(len(values)))}
        if axis:
            attrs["dim"] = axis
        return self("aten.stack.default", values, [wanted], attrs=attrs)[0]


ROUTING = frozenset(
    {
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
"""What routers are made of, besides element-wise ops."""


def is_routing(op: Op) -> bool:
    if op.name in ROUTING:
        return True
    return op.name.startswith("aten.") and torch.Tag.pointwise in overload(op.name).tags


def routing_behind(
    scope: Scope, values: Iterable[Value], most: int, stops: Container[str] = ()
) -> Iterator[Value]:
    """`values` and what they are made of by routing ops, nearest first, until `most` were met;
    nothing behind the ops called as in `stops`."""
    waiting = list(values)
    seen = set(waiting)
    while waiting and len(seen) < most:
        value = waiting.pop(0)
        yield value
        op = scope.maker(value)
        if op is None or not is_routing(op) or op.name in stops:
            continue
        for source in op.inputs:
            if source not in seen:
                seen.add(source)
                waiting.append(source)


def choices(scope: Scope, values: Iterable[Value], limit: int = 400) -> tuple[Op, ...]:
    """The ops that choose experts for `values`, seen through routing alone, in order."""
    stack, seen = list(values), set(values)
    found: dict[Op, None] = {}
    while stack and len(seen) < limit:
        op = scope.maker(stack.pop())
        if op is None or not is_routing(op):
            continue
        if op.name in CHOICES:
            found[op] = None
        for value in op.inputs:
            if value not in seen:
                seen.add(value)
                stack.append(value)
    return tuple(sorted(found, key=scope.position.__getitem__))


def chooses(scope: Scope, value: Value) -> bool:
    return bool(choices(scope, [value]))
