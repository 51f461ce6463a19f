"""MXFP4 as gpt-oss stores its experts: blocks of 32 weights in 16 bytes, an exponent each.

    gate_up_proj_blocks u8[E, N, K / 32, 16]   gate_up_proj_scales u8[E, N, K / 32]

The low half of a byte is the first weight. The model's own weight is [E, K, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import MXFP4_BLOCK, Format
from moec.sources.checkpoint.fields import check_dtype, check_shape
from moec.sources.checkpoint.tensors import Tensors
from moec.sources.checkpoint.weight import CheckpointWeight, WeightCodes, in_codes, plain

_BLOCKS = "_blocks"


def read(config: Mapping[str, Any], tensors: Tensors) -> dict[str, CheckpointWeight]:
    """The weights of an MXFP4 checkpoint. Raises CaptureError where its tensors do not fit."""
    weights = {}
    claimed: set[str] = set()
    for name in tensors:
        if name.endswith(_BLOCKS) and tensors.dtype(name) == torch.uint8:
            stem = name.removesuffix(_BLOCKS)
            weights[stem] = _weight(tensors, stem)
            claimed.update(weights[stem].tensors)
    return weights | {name: plain(tensors, name) for name in tensors if name not in claimed}


def _weight(tensors: Tensors, stem: str) -> CheckpointWeight:
    blocks, scales = stem + _BLOCKS, f"{stem}_scales"
    shape = tensors.shape(blocks)
    if scales not in tensors or len(shape) != 4 or shape[-1] != MXFP4_BLOCK // 2:
        raise CaptureError(f"{blocks} has no {scales} next to it, or is not [E, N, blocks, 16]")
    check_shape(scales, tensors.shape(scales), shape[:-1])
    check_dtype(tensors, scales, torch.uint8)

    def codes() -> Quantised:
        bytes = tensors.read(blocks)
        halves = torch.stack((bytes & 15, bytes >> 4), -1)
        return Quantised(halves.flatten(-3), tensors.read(scales), None)

    e, n, count, _ = shape
    format = Format("mxfp4", MXFP4_BLOCK)
    return in_codes((e, count * MXFP4_BLOCK, n), (blocks, scales), WeightCodes(format, codes, True))
