"""The operands of kernels with few bits: packed codes and scales of weights, and rows rounded to
codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import relax

from moec.codegen.cpu.quantised.layout import (
    BYTES,
    QuantisedLayout,
    RowCodes,
    pack_codes,
    pack_scales,
)
from moec.codegen.cpu.quantised.round_rows import round_rows
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param
from moec.ir.graph import TensorType, Value
from moec.ir.sizes.dims import product


def rounded(low: Lowering, x: Value, blocks: int = 1, form: RowCodes = BYTES) -> list[relax.Expr]:
    """Codes, scales and sums of the rows of x[.., K], computed once for all ops that read them."""
    width, rows = x.shape[-1], product(x.shape[:-1])
    assert isinstance(width, int)
    flat = low.shaped(x, TensorType(x.dtype, (rows, width)))
    key = (flat, blocks, form)
    if key not in low.rounded:
        dtype = sc.STORED[x.dtype]
        function = low.function(
            ("round_rows", width, blocks, form, dtype),
            "round_rows",
            lambda name: round_rows(low.target, width, blocks, dtype, name, form),
        )
        types = [
            TensorType("i32", (rows, form.planes * form.words(width))),
            TensorType("f32", (rows, blocks)),
            TensorType("i32", (rows, form.planes * blocks)),
        ]
        low.rounded[key] = low.call(function, [flat], types)
    return low.rounded[key]


def packed_codes(layout: QuantisedLayout, codes: tuple[Value, ...]) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack_codes(layout, *map(_stacked, tensors))

    type = TensorType("i32", layout.shape)
    return (layout, codes), Param(_name(codes), type, codes, make)


def packed_scales(layout: QuantisedLayout, scales: tuple[Value, ...]) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack_scales(layout, *map(_stacked, tensors))

    type = TensorType(scales[0].dtype, layout.scale_shape)
    return (layout, scales), Param(_name(scales), type, scales, make)


def _name(values: tuple[Value, ...]) -> str:
    return "+".join(value.name for value in values) + ".packed"


def _stacked(tensor: torch.Tensor) -> torch.Tensor:
    """The weights with an axis of groups in front; a dense product has one group."""
    return tensor if tensor.ndim == 3 else tensor[None]
