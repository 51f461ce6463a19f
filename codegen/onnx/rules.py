"""The table of builders by op. A builder writes the nodes of one op and returns the names of its
results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from moec.codegen.onnx.sizes import reshaped
from moec.codegen.onnx.writer import NodeWriter
from moec.errors import NoMatch
from moec.ir.aten import named
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim


@dataclass(frozen=True)
class Call:
    """One op while it is written: `c["dim"]` is an argument by its name in torch's schema."""

    w: NodeWriter
    op: Op

    def __getitem__(self, name: str) -> Any:
        return named(self.op)[name]

    @property
    def out(self) -> Value:
        return self.op.outputs[0]

    def read(self, value: Value, dtype: str | None = None) -> str:
        """A value's name, cast to `dtype` if its dtype differs."""
        return self.w.cast(self.w.read(value), value.dtype, dtype or value.dtype)

    def operand(self, name: str, dtype: str) -> str:
        """An argument that is a tensor, a number or a size, as a tensor of that dtype."""
        argument = self[name]
        if isinstance(argument, Value):
            return self.read(argument, dtype)
        if isinstance(argument, sympy.Expr):
            return self.w.cast(self.w.scalar(argument), "i64", dtype)
        if not isinstance(argument, bool | int | float):
            raise NoMatch(f"operator {self.op.name} with {name}={argument} has no ONNX form")
        return self.w.constant(argument, dtype)

    def reshaped(self, value: Value, shape: Sequence[Dim]) -> str:
        return reshaped(self.w, self.w.read(value), value.shape, shape)

    def expanded(self, name: str, have: Sequence[Dim], want: Sequence[Dim]) -> str:
        """`name` repeated along axes of size 1, and along new leading axes."""
        if [self.w.bound(d) for d in have] == [self.w.bound(d) for d in want]:
            return name
        return self.w("Expand", name, self.w.shape(want))


Builder = Callable[[Call], "str | Sequence[str]"]
BUILD: dict[str, Builder] = {}


def build(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        for name in names:
            BUILD[full(name)] = builder
        return builder

    return register


def full(name: str) -> str:
    """ "add.Tensor" -> "aten.add.Tensor", "exp" -> "aten.exp.default"; moec's own are whole."""
    if name.startswith(("nn.", "moe.", "grouped.", "moec.")):
        return name
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


def axis(dim: int, rank: int) -> int:
    return dim % rank if rank else 0
