"""bitsandbytes: 4 bits by a table of 16 values (nf4, fp4) in blocks of the flat weight, or int8.

    weight u8[N * K / 2, 1]             two codes a byte, the first in the high half
    weight.quant_map f32[16]            w = quant_map[code] * absmax[i / blocksize]
    weight.absmax f32[blocks]           or u8[blocks], quantised again, in blocks of 256:
        nested_quant_map f32[256]       absmax = nested_quant_map[u8] * nested_absmax[j / 256]
        nested_absmax f32[blocks / 256]          + nested_offset
    weight.quant_state.bitsandbytes__nf4 u8[..]    JSON: shape, blocksize, nested_offset

    weight i8[N, K]   SCB f32[N]        w = weight * SCB / 127

Modules of `llm_int8_skip_modules` have plain weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import Format
from moec.sources.checkpoint.fields import check_dtype, check_shape
from moec.sources.checkpoint.tensors import Tensors
from moec.sources.checkpoint.weight import CheckpointWeight, WeightCodes, in_codes, plain

_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_ROWS = 0
"""The weight_format of int8 in the order of rows; others are for kernels of older GPUs."""


@dataclass(frozen=True)
class _State:
    """What the JSON of a 4-bit weight says. `nested` is the block of the scales, 0 without."""

    type: str
    shape: tuple[int, int]
    block: int
    nested: int
    offset: float


def read(config: Mapping[str, Any], tensors: Tensors) -> dict[str, CheckpointWeight]:
    """The weights of a bitsandbytes checkpoint. Raises CaptureError where its tensors do not
    fit."""
    weights = {}
    for name in tensors:
        stem, state, kind = name.rpartition(_STATE)
        if state:
            weights[stem] = _four_bits(tensors, stem, kind)
        elif name.endswith(".weight") and tensors.dtype(name) == torch.int8:
            weights[name] = _int8(tensors, name)
    claimed = {name for weight in weights.values() for name in weight.tensors}
    for name in tensors:
        if name.endswith(".weight") and name not in claimed and tensors.dtype(name) == torch.uint8:
            raise CaptureError(f"the packed weight {name} has no {name}{_STATE}nf4 next to it")
    return weights | {name: plain(tensors, name) for name in tensors if name not in claimed}


def _four_bits(tensors: Tensors, name: str, kind: str) -> CheckpointWeight:
    parts = [f"{name}.absmax", f"{name}.quant_map"]
    state_name = f"{name}{_STATE}{kind}"
    state = _state(tensors, state_name, kind)
    if state.nested:
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    for each in (name, *parts):
        if each not in tensors:
            raise CaptureError(f"{state_name} has no {each} next to it")
    n, k = state.shape
    blocks = -(-n * k // state.block)
    counts = (blocks, 16, *((-(-blocks // state.nested), 256) if state.nested else ()))
    for each, count in zip(parts, counts, strict=True):
        check_shape(each, tensors.shape(each), (count,))
    words = -(-n * k // 2) // tensors.dtype(name).itemsize  # bytes, or words of them for FSDP
    check_shape(name, tensors.shape(name), (words, 1), (1, words))
    check_dtype(tensors, parts[0], torch.uint8 if state.nested else torch.float32)
    for each in parts[1:]:
        check_dtype(tensors, each, torch.float32)

    def values() -> Tensor:
        packed = tensors.read(name).flatten().view(torch.uint8)
        codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[: n * k]
        scales = tensors.read(parts[0])
        if state.nested:
            outer = _by_block(tensors.read(parts[2]), state.nested, blocks)
            scales = tensors.read(parts[3])[scales.int()] * outer + state.offset
        full = tensors.read(parts[1])[codes.int()]
        return full.mul_(_by_block(scales, state.block, n * k)).view(n, k)

    block = next((b for b in (128, 64, 32) if state.block % b == 0 and k % b == 0), 0)
    return CheckpointWeight(
        (n, k), (name, *parts, state_name), values, nearest=Format("int8", block),
        reason=f"kernels multiply integers, and {kind} is a table of values",
    )  # fmt: skip


def _by_block(scales: Tensor, block: int, count: int) -> Tensor:
    """The scale of each of `count` numbers; the last block may be shorter."""
    return scales.repeat_interleave(block)[:count]


def _state(tensors: Tensors, name: str, kind: str) -> _State:
    """Raises CaptureError where the JSON is damaged."""
    check_dtype(tensors, name, torch.uint8)
    try:
        content = json.loads(bytes(tensors.read(name).tolist()))
        n, k = content["shape"]
        nested = content.get("nested_blocksize", 0)
        state = _State(
            content["quant_type"], (n, k), content["blocksize"], nested,
            float(content["nested_offset"] if nested else 0),
        )  # fmt: skip
        sizes = (n, k, state.block, nested if nested else 1)
        fits = all(type(size) is int and size > 0 for size in sizes)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, OverflowError):
        fits = False
    if not fits or state.type != kind or kind not in _TYPES or not math.isfinite(state.offset):
        raise CaptureError(
            f"{name} is damaged, or no {' or '.join(_TYPES)} of a matrix: copy the file again from "
            "the source of the checkpoint"
        )
    return state


def _int8(tensors: Tensors, name: str) -> CheckpointWeight:
    module = name.removesuffix("weight")
    scales, order, shape = f"{module}SCB", f"{module}weight_format", tensors.shape(name)
    if scales not in tensors or len(shape) != 2:
        raise CaptureError(f"the integers {name} have no {scales}, or are no matrix")
    check_shape(scales, tensors.shape(scales), shape[:1])
    check_dtype(tensors, scales, torch.float32)
    names = (name, scales, *([order] if order in tensors else []))
    if order in tensors and bool((tensors.read(order) != _ROWS).any()):
        raise CaptureError(f"{order} says that {name} is not stored by rows: save it with a newer "
                           "bitsandbytes")  # fmt: skip

    def codes() -> Quantised:
        integers = tensors.read(name).view(torch.uint8) ^ 128
        return Quantised(integers, (tensors.read(scales) / 127)[:, None], None)

    return in_codes((shape[0], shape[1]), names, WeightCodes(Format("int8", scales="f32"), codes))
