"""The table of all generic ops; importing this module fills it."""

from __future__ import annotations

from moec.codegen.loops import (
    arithmetic,
    create,
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
from moec.codegen.loops.rules import EMIT

FILLED_BY = (
    arithmetic,
    create,
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
