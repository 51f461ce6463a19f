"""The table of all generic ops; importing this module fills it."""

from __future__ import annotations

from moec.codegen.loops.elements import arithmetic, functions
from moec.codegen.loops.layers import moe, rotary
from moec.codegen.loops.moves import join, lookup, move, reshape, scatter
from moec.codegen.loops.reductions import matrix, moments, order, reduce, softmax
from moec.codegen.loops.rules import EMIT

FILLED_BY = (
    arithmetic,
    functions,
    join,
    lookup,
    matrix,
    moe,
    moments,
    move,
    order,
    reduce,
    reshape,
    rotary,
    scatter,
    softmax,
)

__all__ = ["EMIT"]
