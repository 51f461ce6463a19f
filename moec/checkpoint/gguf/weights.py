"""The weights of GGUF files.

    Q8_0    scale f16, 32 codes i8                                  int8:32, exactly
    Q4_0    scale f16, 16 bytes: low halves first, then high        int4:32, exactly
    MXFP4   exponent u8, 16 bytes in the same order                 mxfp4, exactly
    others  dequantised by the package gguf, then int8:32

How tensors become the weights of a model is in arrange.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moec.checkpoint.tensors import mapped
from moec.checkpoint.weight import CheckpointWeight, WeightCodes
from moec.files.gguf import BLOCKS, GgufHeader, GgufTensor
from moec.formats.integer import Quantised
from moec.formats.notation import Format

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EXACT = {
    "Q8_0": Format("int8", 32, scales="f16"),
    "Q4_0": Format("int4", 32, scales="f16"),
    "MXFP4": Format("mxfp4", 32),
}
NEAREST = Format("int8", 32)


@dataclass(frozen=True)
class GgufWeights:
    """Reads tensors of mapped files."""

    header: GgufHeader
    maps: Mapping[Path, mmap.mmap]

    def rows(self, tensor: GgufTensor) -> Tensor:
        """The blocks u8[.., blocks of a row, bytes] of a tensor."""
        _, block, size = BLOCKS[tensor.type]
        flat = torch.frombuffer(
            self.maps[tensor.path], dtype=torch.uint8, count=tensor.length, offset=tensor.start
        )
        return flat.view(*tensor.shape[:-1], tensor.shape[-1] // block, size)

    def values(self, tensor: GgufTensor) -> Tensor:
        rows = self.rows(tensor)
        if tensor.type in PLAIN:
            return rows.view(PLAIN[tensor.type]).view(tensor.shape)
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType(BLOCKS[tensor.type][0])
        return torch.from_numpy(dequantize(rows.flatten(-2).numpy(), kind)).view(tensor.shape)

    def codes(self, tensor: GgufTensor) -> Quantised:
        rows = self.rows(tensor)
        if tensor.type == "MXFP4":
            return Quantised(_halves(rows[..., 1:]), rows[..., 0].contiguous(), None)
        scales = rows[..., :2].contiguous().view(torch.float16).squeeze(-1)
        data = rows[..., 2:]
        codes = (data ^ 128).flatten(-2) if tensor.type == "Q8_0" else _halves(data)
        return Quantised(codes, scales, None)


def map_gguf(header: GgufHeader) -> GgufWeights:
    """The tensors of a GGUF file and of those that it is split into."""
    return GgufWeights(header, {path: mapped(path) for path in header.files})


def stored_weights(files: GgufWeights) -> dict[str, CheckpointWeight]:
    """The tensors of the files, under their own names."""
    return {name: _weight(files, name, tensor) for name, tensor in files.header.tensors.items()}


def _weight(files: GgufWeights, name: str, tensor: GgufTensor) -> CheckpointWeight:
    weight = CheckpointWeight(tensor.shape, (name,), lambda: files.values(tensor))
    if tensor.type in PLAIN:
        return replace(weight, dtype=PLAIN[tensor.type])
    if tensor.type in EXACT:
        codes = WeightCodes(EXACT[tensor.type], lambda: files.codes(tensor))
        return replace(weight, codes=codes, values=codes.values)
    return replace(weight, nearest=NEAREST, reason=f"kernels read no {tensor.type}")


def _halves(data: Tensor) -> Tensor:
    """bytes u8[.., 16] -> codes u8[.., 32] with the low halves first, in one row."""
    return torch.cat((data & 15, data >> 4), -1).flatten(-2)


def dtype_of(header: GgufHeader) -> torch.dtype:
    """The dtype of the model: float32 or float16 where all matrices are, else bfloat16."""
    types = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    one = PLAIN.get(next(iter(types))) if len(types) == 1 else None
    return one or torch.bfloat16
