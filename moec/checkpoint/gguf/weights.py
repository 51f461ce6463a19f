"""The weights of GGUF files.

    Q8_0    scale f16, 32 codes i8                                  int8:32, exactly
    Q4_0    scale f16, 16 bytes: low halves first, then high        int4:32, exactly
    MXFP4   exponent u8, 16 bytes in the same order                 mxfp4, exactly
    others  dequantised by the package gguf, then int8:32

llama.cpp stores the rows of q and k of llamas in pairs; here they return to transformers' order.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.checkpoint.gguf.model import model_name
from moec.checkpoint.tensors import mapped
from moec.checkpoint.weight import CheckpointWeight, WeightCodes
from moec.errors import CaptureError
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
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")


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


def read(config: Mapping[str, Any], files: GgufWeights) -> dict[str, CheckpointWeight]:
    """The weights under transformers' names. Raises CaptureError where gate and up differ."""
    weights: dict[str, CheckpointWeight] = {}
    experts: dict[str, dict[str, CheckpointWeight]] = {}
    paired = config["model_type"] in ("llama", "mixtral")
    for name, tensor in files.header.tensors.items():
        weight = _weight(files, name, tensor)
        if match := _EXPERTS.fullmatch(name):
            experts.setdefault(match[1], {})[match[2]] = weight
            continue
        if paired and name.endswith(("attn_q.weight", "attn_k.weight")):
            key = "num_attention_heads" if "attn_q" in name else "num_key_value_heads"
            heads = config.get(key, config["num_attention_heads"])
            weight = _reordered(weight, _unpaired(name, tensor.shape[0], heads))
        if name.endswith("ffn_gate_inp_shexp.weight") and len(weight.shape) == 1:
            weight = replace(weight, shape=(1, *weight.shape), values=_row(weight.values))
        weights[model_name(name)] = weight
    for layer, parts in experts.items():
        stem = f"model.layers.{layer}.mlp.experts"
        for part in ("gate", "up", "down"):
            if part not in parts:
                raise CaptureError(f"the file has no blk.{layer}.ffn_{part}_exps.weight")
        weights[f"{stem}.gate_up_proj"] = _joined(parts["gate"], parts["up"])
        weights[f"{stem}.down_proj"] = parts["down"]
    return weights


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


def _row(values: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: values()[None]


def _unpaired(name: str, rows: int, heads: int) -> Tensor:
    """The rows in transformers' order: halves of a head, where llama.cpp has pairs."""
    if heads < 1 or rows % (2 * heads):
        raise CaptureError(f"the {rows} rows of {name} are not of {heads} heads")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _reordered(weight: CheckpointWeight, order: Tensor) -> CheckpointWeight:
    """The weight with its rows [N, K] in another order."""
    values = weight.values
    if weight.codes is None:
        return replace(weight, values=lambda: values()[order])
    codes = weight.codes

    def reordered() -> Quantised:
        parts = codes.read()
        return Quantised(parts.codes[order], parts.scales[order], None)

    held = replace(codes, read=reordered)
    return replace(weight, codes=held, values=held.values)


def _joined(gate: CheckpointWeight, up: CheckpointWeight) -> CheckpointWeight:
    """gate and up [E, H, D] as one weight [E, 2 * H, D]."""
    if gate.shape != up.shape or len(gate.shape) != 3:
        raise CaptureError(
            f"{gate.tensors[0]} is {list(gate.shape)}, and {up.tensors[0]} is {list(up.shape)}"
        )
    e, h, d = gate.shape
    both = replace(
        gate,
        shape=(e, 2 * h, d),
        tensors=gate.tensors + up.tensors,
        values=lambda: torch.cat((gate.values(), up.values()), 1),
        codes=None,
    )
    first, second = gate.codes, up.codes
    if first is None and second is None:
        return both
    if first is None or second is None or first.format != second.format:
        return replace(both, nearest=NEAREST, reason="gate and up are of different types")

    def codes() -> Quantised:
        a, b = first.read(), second.read()
        return Quantised(torch.cat((a.codes, b.codes), 1), torch.cat((a.scales, b.scales), 1), None)

    return replace(both, codes=WeightCodes(first.format, codes))


def dtype_of(header: GgufHeader) -> torch.dtype:
    """The dtype of the model: float32 or float16 where all matrices are, else bfloat16."""
    types = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    one = PLAIN.get(next(iter(types))) if len(types) == 1 else None
    return one or torch.bfloat16
