"""Positions of axes, and starts of slices."""

from __future__ import annotations

from typing import Any

import sympy
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import index as ix
from moec.codegen.loops.emission import Point
from moec.codegen.loops.index import Index, Position
from moec.ir.sizes.dims import Dim


def wrap(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def offset(p: Point, start: Any, size: Dim) -> Index:
    """The start of a slice: counted from the end if negative, and at least 0."""
    if start is None:
        return ix.const(0)
    if isinstance(start, int) and start >= 0:
        return ix.const(start)
    if isinstance(start, int) and isinstance(size, int):
        return ix.const(max(0, size + start))
    if isinstance(start, sympy.Expr) and start.is_nonnegative:
        return p.size(start)
    expr = p.emission.sizes.expr(start)
    wrapped = T.Select(expr < 0, expr + p.emission.sizes.expr(size), expr)
    return Index(tirx.max(wrapped, tirx.const(0, "int64")), ("start", str(start), str(size)))


def replaced(at: Position, axis: int, by: Index) -> Position:
    return (*at[:axis], by, *at[axis + 1 :])
