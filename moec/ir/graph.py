"""The graph: immutable data. A pass builds the next graph; no graph is changed in place.

An ATen op keeps the argument names of its schema: tensors are in `inputs`, in schema order, all
other arguments in `attrs`. For a list of tensors (cat, index), the attribute holds `Ref(i)`, which
means input number i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, total_ordering
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import sympy

from moec.ir.sizes.dims import Bounds, Dim, canonical, show_dim

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ref:
    """Input number `index` of the op, as an item of a list attribute."""

    index: int


@dataclass(frozen=True)
class DType:
    """A dtype as the value of an attribute."""

    name: str


Attr: TypeAlias = "bool | int | float | str | sympy.Expr | Ref | DType | tuple[Attr, ...] | None"


@total_ordering
class Stage(Enum):
    """Which ops a graph may hold: the value is the prefixes of their names. Stages are ordered: a
    pass that takes a stage accepts graphs of all earlier stages."""

    ATEN = ("aten.", "moec.", "nn.")
    MOE = ("aten.", "moec.", "nn.", "moe.", "dist.")
    GROUPED = ("aten.", "moec.", "nn.", "moe.", "dist.", "grouped.")

    def __lt__(self, other: Stage) -> bool:
        return len(self.value) < len(other.value)


def stage_of(graph: Graph) -> Stage:
    """The first stage that allows all ops of the graph."""
    return next(s for s in Stage if all(op.name.startswith(s.value) for op in graph.ops))


@dataclass(frozen=True)
class TensorType:
    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(canonical(d) for d in self.shape))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(show_dim(d) for d in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor. Values are compared by identity; the name is only for printing."""

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
    """One operation. `origin` is the path of the user's module, `line` the user's line of code as
    file.py:12 with its text; `line` is for messages only and is not part of the graph's text."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Attr] = field(default_factory=lambda: MappingProxyType({}))
    body: Graph | None = None
    origin: str = ""
    line: str = ""

    def __str__(self) -> str:
        results = ", ".join(v.name for v in self.outputs)
        where = f" @ {self.origin}" if self.origin else ""
        return f"{results} = {self.name}{where}"


@dataclass(frozen=True, eq=False)
class State:
    """A buffer that the model mutates: its content before a call and after it."""

    before: Value
    after: Value


@dataclass(frozen=True, eq=False)
class Graph:
    """`inputs` change with each call, `params` are bound once, `states` persist between calls.

    Each `State.before` is one of the last `inputs`, after those that the caller passes. `ops` are
    pure and in topological order. `bounds` holds the limits of the named sizes, and those of
    expressions of them by their text: B*S in [0, 512], and Mod(S, 4) in [0, 0] for a multiple of 4.
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
        """The op that computes each value; inputs and params are absent."""
        return {value: op for op in self.ops for value in op.outputs}

    @cached_property
    def readers(self) -> Mapping[Value, tuple[Op, ...]]:
        """The ops that read each value, in order, one entry per read."""
        readers: dict[Value, list[Op]] = {}
        for op in self.ops:
            for value in op.inputs:
                readers.setdefault(value, []).append(op)
        return {value: tuple(ops) for value, ops in readers.items()}

    @cached_property
    def last_reads(self) -> Mapping[int, tuple[Value, ...]]:
        """For ops by position: the values, other than results, that no later op reads."""
        results = set(self.results)
        last = {v: i for i, op in enumerate(self.ops) for v in (*op.inputs, *op.outputs)}
        freed: dict[int, list[Value]] = {}
        for value, index in last.items():
            if value not in results:
                freed.setdefault(index, []).append(value)
        return {index: tuple(values) for index, values in freed.items()}

    @property
    def results(self) -> tuple[Value, ...]:
        """The values that a call returns or stores: outputs and the states' new contents."""
        return self.outputs + tuple(state.after for state in self.states)

    def values(self) -> Iterator[Value]:
        yield from self.inputs
        yield from self.params
        for op in self.ops:
            yield from op.outputs


@dataclass(frozen=True)
class Program:
    """A graph with its weights: the tensor of each param, by name."""

    graph: Graph
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Module:
    """The functions of one compiled model: programs by name, `main` first. They share weights by
    name. `moec.runtime.package` documents the names."""

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
