"""The table of all generic ops, filled."""

from __future__ import annotations

from moec.codegen.generic import (
    arithmetic,
    functions,
    lookup,
    matrix,
    moe,
    order,
    reduce,
    scatter,
    shape,
)
from moec.codegen.generic.rules import EMIT

FILLED_BY = (arithmetic, functions, lookup, matrix, moe, order, reduce, scatter, shape)

__all__ = ["EMIT"]
