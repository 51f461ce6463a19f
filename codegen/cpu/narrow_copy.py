"""Copies of 4 bits of packed weights, which the store of experts reads instead of them on request.

An expert's copy has the elements of its packed array in their order: codes of 4 bits, then a scale
in bf16 for each NARROW_BLOCK of them; narrow_copy.c, which widens it, describes both. It depends on
no layout of a kernel.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from moec.runtime.artifact.part_writers import on_all_cores
from moec.runtime.dtypes import Array
from moec.runtime.package import NARROW_BLOCK, narrow_bytes

_DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
_LEAST = -8
"""The code of the element of the greatest size in a block."""


def narrow_copy(array: Array, kind: str) -> Array:
    """u8[E, narrow_bytes] of the packed weights [E, ...] of experts, whose memory has elements of
    the dtype `kind`."""
    experts = array.reshape(len(array), -1).view(_DTYPES[kind])
    result = np.empty((len(experts), narrow_bytes(experts.shape[1])), np.uint8)

    def write(expert: int) -> None:
        result[expert] = _copied(experts[expert].astype(np.float32))

    on_all_cores(write, range(len(experts)), [experts.shape[1]] * len(experts))
    return result


def _copied(elements: Array) -> Array:
    blocks = np.pad(elements, (0, -len(elements) % NARROW_BLOCK)).reshape(-1, NARROW_BLOCK)
    at = np.abs(blocks).argmax(axis=1)
    scales = _shortened(np.take_along_axis(blocks, at[:, None], axis=1) / _LEAST)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = (np.clip(np.rint(blocks * inverse), _LEAST, -_LEAST - 1) - _LEAST).astype(np.uint8)
    low, high = np.split(codes, 2, axis=1)
    packed = (low | high << 4).reshape(-1)
    return np.concatenate([packed, scales.astype(ml_dtypes.bfloat16).view(np.uint8).reshape(-1)])


def _shortened(scales: Array) -> Array:
    """Rounded to 5 significant bits, with which every code has an exact product."""
    bits = scales.view(np.int32)
    return ((bits + (1 << 18)) & ~np.int32((1 << 19) - 1)).view(np.float32)
