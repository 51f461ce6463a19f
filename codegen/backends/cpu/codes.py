"""The operands of kernels with few bits: packed codes and scales of weights, and rows rounded to
codes or, for fp8 weights, as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tvm import relax

from moec.codegen.cpu import unpack
from moec.codegen.cpu.quantised.layout import (
    BYTES,
    QuantisedLayout,
    RowCodes,
    mark_nan,
    pack_codes,
    pack_scales,
)
from moec.codegen.cpu.quantised.round_rows import round_rows
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param
from moec.ir.graph import TensorType, Value
from moec.ir.ops.experts.quantised import Matrix
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


def rows_for(low: Lowering, x: Value, layout: QuantisedLayout) -> list[relax.Expr]:
    """The rows of x[.., K] as kernels of `layout` read them."""
    if layout.floats:
        return [low.shaped(x, TensorType(x.dtype, (product(x.shape[:-1]), layout.spec.k)))]
    return list(rounded(low, x, layout.blocks, layout.row_codes))


def packed_matrices(
    layout: QuantisedLayout, matrices: Sequence[Matrix]
) -> list[tuple[object, Param]]:
    """Packed codes, scales and, if there are any, zeros."""
    codes, scales = (tuple(getattr(m, part) for m in matrices) for part in ("codes", "scales"))
    marked = codes if layout.floats else ()
    params = [packed_codes(layout, codes), packed_scales(layout, scales, marked)]
    if zeros := tuple(m.zeros for m in matrices if m.zeros is not None):
        params.append(packed_scales(layout, zeros))
    return params


def packed_codes(layout: QuantisedLayout, codes: tuple[Value, ...]) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack_codes(layout, *map(_stacked, tensors))

    type = TensorType("i32", layout.shape)
    held = partial(unpack.codes, layout)
    return (layout, codes), Param(_name(codes), type, codes, make, unpack=held)


def packed_scales(
    layout: QuantisedLayout, scales: tuple[Value, ...], marked: tuple[Value, ...] = ()
) -> tuple[object, Param]:
    """Packed scales; those of `marked` codes of e4m3 are NaN where a code is."""

    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        parts = tensors[: len(scales)]
        if marked:
            parts = tuple(map(mark_nan, parts, tensors[len(scales) :]))
        return pack_scales(layout, *map(_stacked, parts))

    type = TensorType(scales[0].dtype, layout.scale_shape)
    held = partial(unpack.scales, layout, bool(marked))
    return (layout, scales), Param(_name(scales), type, scales, make, marked, held)


def _name(values: tuple[Value, ...]) -> str:
    return "+".join(value.name for value in values) + ".packed"


def _stacked(tensor: torch.Tensor) -> torch.Tensor:
    """The weights with an axis of groups in front; a dense product has one group."""
    return tensor if tensor.ndim == 3 else tensor[None]
