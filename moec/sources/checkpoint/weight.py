"""A weight of a checkpoint: its shape, the tensors that hold it, and how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised, dequantise
from moec.ir.formats.notation import Format
from moec.sources.checkpoint.tensors import Tensors

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightCodes:
    """A weight in few bits, read when needed: codes u8[.., N, K], scales and zeros [.., N, blocks]
    in `format`. `transposed` where the model's weight is [.., K, N]."""

    format: Format
    read: Callable[[], Quantised]
    transposed: bool = False

    def values(self) -> Tensor:
        """The weight in float32, in the model's orientation."""
        stored = self.read()
        values = dequantise(self.format.kind, stored.codes, stored.scales, stored.zeros)
        return values.mT if self.transposed else values


@dataclass(frozen=True)
class CheckpointWeight:
    """One weight, under the name that its checkpoint gives it.

    `tensors` are the tensors of the file that belong to it. `values` reads it: in float32, or as it
    is stored if `dtype` says so. `codes` holds it exactly, where moec has a format for it; else
    `nearest` is the format to which it is converted, and `reason` says why.
    """

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    values: Callable[[], Tensor]
    codes: WeightCodes | None = None
    nearest: Format | None = None
    reason: str = ""
    dtype: torch.dtype | None = None


def plain(tensors: Tensors, name: str) -> CheckpointWeight:
    """A weight that is stored as it is. Raises CaptureError where its numbers are no floats."""
    shape, dtype = tensors.shape(name), tensors.dtype(name)
    if dtype not in _FLOATS and name.endswith((".weight", "_proj")):
        raise CaptureError(
            f"the weight {name} is of {str(dtype)[6:]}, and config.json names "
            "no quantisation that says what its numbers mean: copy config.json again"
        )
    return CheckpointWeight(shape, (name,), lambda: tensors.read(name), dtype=dtype)


def in_codes(
    shape: tuple[int, ...], tensors: tuple[str, ...], codes: WeightCodes
) -> CheckpointWeight:
    """A weight whose codes moec stores exactly."""
    return CheckpointWeight(shape, tensors, codes.values, codes)


def in_few_bits(weight: CheckpointWeight) -> bool:
    return weight.codes is not None or weight.nearest is not None


def nearest_int8(width: int) -> Format:
    """The 8-bit format with the largest block that divides a row of `width` weights."""
    return Format("int8", next((b for b in (128, 64, 32) if width % b == 0), 0))


def scale_name(dtype: torch.dtype) -> str:
    """The name of a dtype of scales; float32 for those that formats do not hold."""
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")
