"""Sizes that are read from data, and numbers that are compared with sizes."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import sympy
from tvm import relax

from moec.codegen.backend import Rule, always
from moec.codegen.fusion import FusionGroup
from moec.codegen.loops.index import names
from moec.codegen.module_builder import Lowering
from moec.ir.graph import DType, Op, TensorType, Value
from moec.ir.index_uses import REQUIRE
from moec.ir.sizes.dims import Dim, show_dim
from moec.runtime.sizes.counts import NAME
from moec.runtime.sizes.expressions import NAME as SIZE
from moec.runtime.sizes.indices import NAME as INDEX


def _size(low: Lowering, op: Op) -> list[relax.Expr]:
    """Binds a named size to the computed value, for all later ops."""
    name = cast(str, op.attrs["name"])
    shape = _as_shape(low, op.inputs[0])
    low.builder.match_cast(shape, relax.ShapeType([low.sizes.variables[name]]))
    return [low.value(op.inputs[0])]


def bind_host_sizes(
    low: Lowering, unbound: dict[str, sympy.Expr], unread: Collection[str] = ()
) -> None:
    """Binds those of the `unbound` sizes that depend on none of `unread`, for all later ops, by
    calls of `moec.runtime.sizes.functions.value_of_size`."""
    for name, size in list(unbound.items()):
        size_names = sorted(names(size))
        if not set(size_names) & set(unread):
            del unbound[name]
            values = relax.ShapeExpr([low.sizes.variables[n] for n in size_names])
            call = relax.op.call_pure_packed(
                SIZE, values, show_dim(size), " ".join(size_names), ty_args=relax.ShapeType(ndim=1)
            )
            variable = low.sizes.variables[name]
            low.builder.match_cast(low.builder.emit(call), relax.ShapeType([variable]))


def _require_count(low: Lowering, op: Op) -> list[relax.Expr]:
    """Calls `moec.runtime.sizes.counts.require_count`. Its result is matched with what it must be,
    since a call without readers would be removed."""
    order, count = op.inputs
    rows = [low.sizes.expr(cast("Dim", op.attrs["rows"]))]
    arguments = [
        _as_shape(low, count),
        relax.ShapeExpr(rows),
        relax.prim_value(int(cast(bool, op.attrs["exact"]))),
        cast(str, op.attrs["mask"]),
        cast(str, op.attrs["source"]),
    ]
    call = relax.op.call_pure_packed(NAME, *arguments, ty_args=relax.ShapeType(ndim=1))
    low.builder.match_cast(low.builder.emit(call), relax.ShapeType(rows))
    return [low.value(order)]


def _require_index(low: Lowering, op: Op) -> list[relax.Expr]:
    """Calls `moec.runtime.sizes.indices.require_index`, as `_require_count` its function. On a GPU
    values are not read back: kernels use the nearest row."""
    ids = low.value(op.inputs[0])
    if low.target.kind == "cpu":
        rows = [low.sizes.expr(cast("Dim", op.attrs["rows"]))]
        arguments = [
            ids,
            relax.ShapeExpr(rows),
            relax.prim_value(int(cast(bool, op.attrs["negative"]))),
            cast(str, op.attrs["what"]),
        ]
        call = relax.op.call_pure_packed(INDEX, *arguments, ty_args=relax.ShapeType(ndim=1))
        low.builder.match_cast(low.builder.emit(call), relax.ShapeType(rows))
    return [ids]


def _as_shape(low: Lowering, source: Value) -> relax.Expr:
    """One integer of a tensor as a shape of one axis."""
    scalar = low.value(source)
    if source.dtype != "i64":
        wide = Value(f"{source.name}_wide", TensorType("i64", source.shape))
        cast_ = Op("aten._to_copy.default", (source,), (wide,), {"dtype": DType("i64")})
        scalar = low.group(FusionGroup(cast_, [cast_], (source,)))[0]
    one: tuple[Dim, ...] = (1,)
    if source.shape != one:
        scalar = low.reshaped(scalar, TensorType("i64", one))
    return low.builder.emit(relax.op.tensor_to_shape(scalar))


RULES = (
    Rule("size", ("moec.size",), always, _size),
    Rule("require_count", ("moec.require_count",), always, _require_count),
    Rule("require_index", (REQUIRE,), always, _require_index),
)
