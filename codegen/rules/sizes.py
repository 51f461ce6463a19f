"""Sizes that are read from data."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.backend import Rule, always
from moec.codegen.fusion import FusionGroup
from moec.codegen.module_builder import Lowering
from moec.ir.dims import Dim
from moec.ir.graph import DType, Op, TensorType, Value


def _size(low: Lowering, op: Op) -> list[relax.Expr]:
    """Binds a named size to the computed value, for all later ops."""
    name = cast(str, op.attrs["name"])
    source = op.inputs[0]
    scalar = low.value(source)
    if source.dtype != "i64":
        wide = Value(f"{source.name}_wide", TensorType("i64", source.shape))
        cast_ = Op("aten._to_copy.default", (source,), (wide,), {"dtype": DType("i64")})
        scalar = low.group(FusionGroup(cast_, [cast_], (source,)))[0]
    one: tuple[Dim, ...] = (1,)
    if source.shape != one:
        scalar = low.reshaped(scalar, TensorType("i64", one))
    shape = low.builder.emit(relax.op.tensor_to_shape(scalar))
    low.builder.match_cast(shape, relax.ShapeType([low.sizes.variables[name]]))
    return [low.value(source)]


RULES = (Rule("size", ("moec.size",), always, _size),)
