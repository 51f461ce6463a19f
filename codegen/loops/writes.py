"""Writes to computed positions, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr

from moec.codegen.loops.index import Position
from moec.codegen.loops.scalars import Join, Scalar
from moec.ir.graph import Value
from moec.ir.sizes.dims import Dim


@dataclass(frozen=True)
class Writes:
    """A write at every position of `shape`, in order: x(position) is joined with the element of
    `out` at to(position), or without `join` replaces it, where that is inside. Positions that
    differ along the axes `apart` write to different elements."""

    out: Value
    shape: tuple[Dim, ...]
    to: Callable[[Position], tuple[Position, Expr]]
    x: Callable[[Position], Scalar]
    join: Join | None
    apart: tuple[int, ...] = ()
