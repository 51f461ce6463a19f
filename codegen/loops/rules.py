"""The table of generic ops: emitters fill it, and lowering reads it.

A *point* computes one element of its output from elements of its inputs; it is fused into its
readers. A *kernel* writes its outputs with its own loops; points are fused into those inputs that
it reads once. A *view* is its input with another shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, TypeVar

import torch

from moec.codegen.loops.scalars import Scalar
from moec.ir import aten
from moec.ir.graph import Op, Value

PointEmitter: TypeAlias = Callable[[Any], Scalar]
"""Of a `Point`, which reads this table, as `Emission` does."""
KernelEmitter: TypeAlias = Callable[[Any, Op], None]
"""Of an `Emission`."""
P = TypeVar("P", bound=PointEmitter)
K = TypeVar("K", bound=KernelEmitter)

HEAVY = 8  # the cost of exp and similar functions


@dataclass(frozen=True)
class LoopRule:
    """`cost` is the approximate number of additions per element; 0 moves or creates elements.

    `same_position`: an output element depends only on the input elements at its position (after
    broadcasting). `exact`: a result of a half type needs no rounding.
    """

    point: PointEmitter | None = None
    kernel: KernelEmitter | None = None
    view: bool = False
    cost: int = 1
    same_position: bool = True
    exact: bool = False
    fuses: tuple[str, ...] = ()  # for a kernel: the arguments that may be points


EMIT: dict[str, LoopRule] = {}

# Arithmetic with support for complex numbers; ops that only move elements need none.
COMPLEX = {
    f"aten.{name}"
    for name in (
        "add.Tensor",
        "sub.Tensor",
        "mul.Tensor",
        "mul.Scalar",
        "polar.default",
        "complex.default",
        "where.self",
        "abs.default",
    )
}


def takes_complex(name: str) -> bool:
    rule = EMIT[name]
    return name in COMPLEX or (rule.point is not None and rule.exact and rule.cost == 0)


def point(
    *names: str, cost: int = 1, same_position: bool = True, exact: bool = False
) -> Callable[[P], P]:
    def register(emit: P) -> P:
        for name in names:
            EMIT[_full(name)] = LoopRule(
                point=emit, cost=cost, same_position=same_position, exact=exact
            )
        return emit

    return register


def moves(*names: str) -> Callable[[PointEmitter], PointEmitter]:
    """Registers a point that only selects an element of its input."""
    return point(*names, cost=0, same_position=False, exact=True)


def kernel(*names: str, fuses: tuple[str, ...] = ()) -> Callable[[K], K]:
    def register(emit: K) -> K:
        for name in names:
            EMIT[_full(name)] = LoopRule(kernel=emit, fuses=fuses)
        return emit

    return register


def _full(name: str) -> str:
    """ "add.Tensor" -> "aten.add.Tensor", "exp" -> "aten.exp.default"; names of moec's ops stay."""
    if name.startswith(("nn.", "moe.", "grouped.")):
        return name
    return f"aten.{name}" if "." in name else f"aten.{name}.default"


@cache
def _result_type(a: tuple[str, bool], b: tuple[str, bool] | type) -> str:
    def stand_in(kind: tuple[str, bool]) -> torch.Tensor:
        dtype, scalar = kind
        return torch.empty(() if scalar else (1,), dtype=aten.TORCH_DTYPES[dtype], device="meta")

    other = stand_in(b) if isinstance(b, tuple) else b(1)
    return aten.IR_DTYPES[torch.result_type(stand_in(a), other)]


def common_dtype(a: Any, b: Any) -> str:
    """The dtype in which torch computes with two operands, at least one of them a Value."""
    if not isinstance(a, Value):
        a, b = b, a
    if not isinstance(b, Value):
        kind: Any = type(b) if isinstance(b, bool | int | float) else int
    else:
        kind = (b.dtype, not b.shape)
    return _result_type((a.dtype, not a.shape), kind)
