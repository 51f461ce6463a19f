"""Finds the ops between the tokens and their routed copies, which are part of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.ir.graph import Op
from moec.ir.sizes.dims import product
from moec.ir.traits import CASTS
from moec.passes.recognise.reading.opnames import MULTIPLY, PRODUCTS, REARRANGE, SPREAD
from moec.passes.recognise.region import chooses

if TYPE_CHECKING:
    from moec.passes.recognise.reading.rows import Reader


def spreads(reader: Reader, op: Op) -> bool:
    """Whether the result of `op` consists of copies of the tokens, not of the tokens themselves."""
    if op.name in REARRANGE or op.name in CASTS:
        return only_moves(reader, op)
    if op.name in MULTIPLY and len(op.inputs) == 2:
        return any(v.shape[-1:] == (1,) and chooses(reader.scope, v) for v in op.inputs)
    if op.name in PRODUCTS:
        return len(op.inputs) == 2 and chooses(reader.scope, op.inputs[0])
    if op.name == "aten.index_put.default":
        return reader.is_zeros(op.inputs[0])
    return op.name in SPREAD


def only_moves(reader: Reader, op: Op) -> bool:
    """Whether the value holds copies of the tokens, or [T, D] itself, with its axes rearranged."""
    value = op.outputs[0]
    flat = len(value.shape) == 2 and op.name not in CASTS
    maker: Op | None = op
    while maker is not None and (maker.name in REARRANGE or maker.name in CASTS):
        source = maker.inputs[0]
        if product(maker.outputs[0].shape) != product(source.shape):
            return True
        if len(source.shape) == 2 and not flat and source.shape[-1] in value.shape:
            return True
        maker = reader.scope.maker(source)
    return maker is not None and spreads(reader, maker)


def carrier(reader: Reader, op: Op) -> int:
    """The index of the input that holds the tokens."""
    if op.name in MULTIPLY:
        return 0 if op.inputs[1].shape[-1:] == (1,) and chooses(reader.scope, op.inputs[1]) else 1
    if op.name in PRODUCTS:
        return 1
    return len(op.inputs) - 1 if op.name == "aten.index_put.default" else 0
