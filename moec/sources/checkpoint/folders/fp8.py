"""FP8: e4m3 or e5m2 with a scale for a tensor, a row, or a block of 128 x 128 (DeepSeek).

weight e4m3[.., N, K]   weight_scale or weight_scale_inv, by which the codes are multiplied:
                        [], [1], [N], [.., N, 1] or [.., N / 128, K / 128], rounded up
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor

from moec.dtypes import LONG_NAMES
from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import Format
from moec.sources.checkpoint.fields import SCALES, check_dtype
from moec.sources.checkpoint.tensors import Tensors
from moec.sources.checkpoint.weight import (
    CheckpointWeight,
    WeightCodes,
    in_codes,
    nearest_int8,
    plain,
    scale_name,
)

_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
_OF_ROWS = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale")
"""Scales of activations, which moec takes from the rows themselves."""
REASON = "kernels read no e5m2"


def read(config: Mapping[str, Any], tensors: Tensors) -> dict[str, CheckpointWeight]:
    """The weights of an FP8 checkpoint. Raises CaptureError where scales do not fit."""
    weights = weights_of(tensors, block_of(config))
    claimed = {name for weight in weights.values() for name in weight.tensors}
    return weights | {name: plain(tensors, name) for name in tensors if name not in claimed}


def block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The `weight_block_size` of the configuration. Raises CaptureError where it is no size."""
    size = config.get("weight_block_size")
    if size is None:
        return None
    fits = isinstance(size, list | tuple) and len(size) == 2
    if not fits or not all(isinstance(each, int) and each > 0 for each in size):
        raise CaptureError(f"quantization_config: weight_block_size is {size!r}, not two sizes")
    return size[0], size[1]


def weights_of(tensors: Tensors, block: tuple[int, int] | None) -> dict[str, CheckpointWeight]:
    """The weights that are stored as 8-bit floats."""
    weights = {}
    for name in tensors:
        if tensors.dtype(name) in _FLOATS:
            weights[name] = _weight(tensors, name, block)
    return weights


def _weight(tensors: Tensors, name: str, block: tuple[int, int] | None) -> CheckpointWeight:
    scales = next((name + suffix for suffix in _SCALES if name + suffix in tensors), None)
    shape = tensors.shape(name)
    if scales is None or len(shape) < 2:
        raise CaptureError(f"the 8-bit floats {name} have no {name}_scale or {name}_scale_inv")
    check_dtype(tensors, scales, *SCALES, torch.float8_e8m0fnu)
    sides = _sides(shape, tensors.shape(scales), block, scales)
    stem = name.rpartition(".")[0]
    of_rows = tuple(n for n in (f"{stem}.{part}" for part in _OF_ROWS) if n in tensors)

    n, k = shape[-2:]
    # A block that the end of a row cuts is two or more blocks that fit.
    rows, columns = sides or (1, k)
    width = k if columns >= k else gcd(columns, k)
    format = Format("fp8", width if width < k else 0, scales=scale_name(tensors.dtype(scales)))

    def row_scales() -> Tensor:
        """[.., N, K / width]"""
        scale = tensors.read(scales).to(getattr(torch, LONG_NAMES[format.scales]))
        if sides is None:
            column = scale[:, None] if scale.shape == shape[:1] else scale
            return column.expand(*shape[:-1], 1).contiguous()
        for axis, side, size in ((-2, rows, n), (-1, max(1, columns // width), k // width)):
            scale = scale.repeat_interleave(side, axis).narrow(axis, 0, size)
        return scale.contiguous()

    def values() -> Tensor:
        return tensors.read(name).float() * row_scales().float().repeat_interleave(width, -1)

    def codes() -> Quantised:
        return Quantised(tensors.read(name).view(torch.uint8), row_scales(), None)

    parts = (name, scales, *of_rows)
    if tensors.dtype(name) != torch.float8_e4m3fn:
        return CheckpointWeight(shape, parts, values, nearest=nearest_int8(k), reason=REASON)
    return in_codes(shape, parts, WeightCodes(format, codes))


def _sides(
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    block: tuple[int, int] | None,
    name: str,
) -> tuple[int, int] | None:
    """The sides of a block of one scale; None where scales are of the tensor or of rows."""
    n, k = shape[-2:]
    if scales in ((), (1,), (n,)[: len(shape) - 1], (*shape[:-1], 1)):
        return None
    if len(shape) == 3 and scales == (shape[0], 1, 1):
        return None
    if block is not None and scales == (*shape[:-2], -(-n // block[0]), -(-k // block[1])):
        return block
    raise CaptureError(
        f"{name} is {list(scales)}: no scales of a weight of {list(shape)}"
        + (f" in blocks of {list(block)}" if block else "")
    )
