"""The graph: small, immutable, data only. A pass builds the next graph; nothing is edited.

An op of ATen keeps the argument names of its schema: tensors stand in `inputs` in schema
order, everything else in `attrs`. Where a tensor sits inside a list (cat, index), the
attribute holds `Ref(i)`, meaning input number i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, total_ordering
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import sympy

from moec.ir.dims import Bounds, Dim, normal, show_dim

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ref:
    """Input number `index` of the op, where it stands inside a list."""

    index: int


@dataclass(frozen=True)
class DType:
    """A dtype that stands as an attribute."""

    name: str


Attr: TypeAlias = "bool | int | float | str | sympy.Expr | Ref | DType | tuple[Attr, ...] | None"


@total_ordering
class Stage(Enum):
    """Which ops a graph may hold: the value is the prefixes of their names. Stages are ordered:
    a graph of one may stand where one of a later stage is taken."""

    ATEN = ("aten.", "moec.", "nn.")
    MOE = ("aten.", "moec.", "nn.", "moe.", "dist.")
    GROUPED = ("aten.", "moec.", "nn.", "moe.", "dist.", "grouped.")

    def __lt__(self, other: Stage) -> bool:
        return len(self.value) < len(other.value)


def stage_of(graph: Graph) -> Stage:
    """The first stage whose ops the graph's are."""
    return next(s for s in Stage if all(op.name.startswith(s.value) for op in graph.ops))


@dataclass(frozen=True)
class TensorType:
    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(normal(d) for d in self.shape))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(show_dim(d) for d in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor. Identity is equality: the name is only for people."""

    name: str
    type: TensorType

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype

    def __repr__(self) -> str:
        return f"{self.name}: {self.type}"


@dataclass(frozen=True, eq=False)
class Op:
    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Attr] = field(default_factory=lambda: MappingProxyType({}))
    body: Graph | None = None
    origin: str = ""

    def __str__(self) -> str:
        results = ", ".join(v.name for v in self.outputs)
        where = f" @ {self.origin}" if self.origin else ""
        return f"{results} = {self.name}{where}"


@dataclass(frozen=True, eq=False)
class State:
    """A buffer that the model mutates: what it holds before a call, and what it holds after."""

    before: Value
    after: Value


@dataclass(frozen=True, eq=False)
class Graph:
    """`inputs` come with each call, `params` are bound once, `states` live between calls.

    Each `State.before` is one of `inputs`, after the caller's own; `ops` are pure and in
    topological order. `bounds` holds the limits of the named sizes.
    """

    inputs: tuple[Value, ...]
    params: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]
    states: tuple[State, ...] = ()
    bounds: Mapping[str, Bounds] = field(default_factory=lambda: MappingProxyType({}))
    name: str = "main"

    @cached_property
    def producers(self) -> Mapping[Value, Op]:
        """The op that made each value; inputs and params are absent."""
        return {value: op for op in self.ops for value in op.outputs}

    @cached_property
    def readers(self) -> Mapping[Value, tuple[Op, ...]]:
        """The ops that read each value, in order, one entry per read."""
        readers: dict[Value, list[Op]] = {}
        for op in self.ops:
            for value in op.inputs:
                readers.setdefault(value, []).append(op)
        return {value: tuple(ops) for value, ops in readers.items()}

    @property
    def results(self) -> tuple[Value, ...]:
        """What the graph must compute: its outputs and the states' new contents."""
        return self.outputs + tuple(state.after for state in self.states)

    def values(self) -> Iterator[Value]:
        yield from self.inputs
        yield from self.params
        for op in self.ops:
            yield from op.outputs


@dataclass(frozen=True)
class Program:
    """A graph with the weights that its params stand for."""

    graph: Graph
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Module:
    """Programs by name, `main` first: the functions of one compiled model. They share weights by
    name (see `moec.runtime.package` for what the names mean)."""

    programs: Mapping[str, Program]

    @staticmethod
    def of(main: Program) -> Module:
        """A module of one program."""
        return Module({"main": main})

    def __getitem__(self, name: str) -> Program:
        return self.programs[name]

    def __contains__(self, name: str) -> bool:
        return name in self.programs

    def __iter__(self) -> Iterator[str]:
        return iter(self.programs)

    @property
    def main(self) -> Program:
        return self.programs["main"]
