"""The weights of GGUF files: floats, codes as in codes.py, and other types, which the package gguf
dequantises and moec rounds to int8:32.

How tensors become the weights of a model is in arrange.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moec.files.gguf import BLOCKS, GgufHeader, GgufTensor
from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import Format
from moec.sources.checkpoint.gguf import codes
from moec.sources.checkpoint.tensors import mapped
from moec.sources.checkpoint.weight import CheckpointWeight, WeightCodes

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
        stored = codes.read(tensor.type, self.rows(tensor))
        self.maps[tensor.path].madvise(mmap.MADV_DONTNEED)  # what was read counts as memory
        return stored


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
    if tensor.type in codes.STORED:
        stored = WeightCodes(codes.STORED[tensor.type].format, lambda: files.codes(tensor))
        return replace(weight, codes=stored, values=stored.values)
    return replace(weight, nearest=NEAREST, reason=f"kernels read no {tensor.type}")


def dtype_of(header: GgufHeader) -> torch.dtype:
    """The dtype of the model: float32 or float16 where all matrices are, else bfloat16."""
    types = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    one = PLAIN.get(next(iter(types))) if len(types) == 1 else None
    return one or torch.bfloat16
