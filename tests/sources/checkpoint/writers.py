"""Writes a model's checkpoint in the layout of each format, as published, without moec's code.

Each writer takes the weight f32[N, K] of a linear layer and gives the tensors that the format
stores for it, and its values: the float32 weight that a reader must see.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
Writer = Callable[[Tensor], Written]

LEFT = ("embed_tokens", "lm_head", "norm", ".gate.", "router", ".bias", "sinks")
"""Parts of names of weights that quantisers leave as they are."""


def write(model: Any, folder: Path, quantization: dict[str, Any], writer: Writer) -> Path:
    """Saves the model in `folder`/quantised with all linear layers written by `writer`, and in
    `folder`/plain with the values of those. Returns the first."""
    model.save_pretrained(folder / "plain")
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    with safe_open(folder / "plain/model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if tensor.ndim != 2 or any(part in name for part in LEFT):
                stored[name] = values[name] = tensor
                continue
            parts, values[name] = writer(tensor.float())
            stem = name.removesuffix("weight")
            stored |= {stem + part: each.contiguous() for part, each in parts.items()}
    save_file(values, folder / "plain/model.safetensors", {"format": "pt"})
    quantised = folder / "quantised"
    quantised.mkdir()
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "plain/config.json").read_text())
    config["quantization_config"] = quantization
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised


def integers(
    weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes u8[N, K], scales [N, G] and zeros u8[N, G] of a weight, by rounding to nearest."""
    n, k = weight.shape
    blocks = weight.view(n, k // group, group)
    top = 2**bits - 1
    if symmetric:
        scales = blocks.abs().amax(-1) / (top // 2)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales).round().clamp(1, top)
    scales = scales.to(dtype)
    codes = (blocks / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, top).byte().view(n, k), scales, zeros.byte()


def values_of(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> Tensor:
    """(code - zero) * scale of the group of each column."""
    return (codes.float() - zeros.float()[:, order]) * scales.float()[:, order]


def words(columns: Tensor, bits: int) -> Tensor:
    """u8[R, C] -> i32[R, C * bits / 32], the first column lowest, one integer after another."""
    each = 32 // bits
    packed = torch.zeros(columns.shape[0], columns.shape[1] // each, dtype=torch.int64)
    for i in range(each):
        packed |= columns[:, i::each].long() << bits * i
    return (packed & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def gptq(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    v2: bool = False,
) -> Writer:
    def written(weight: Tensor) -> Written:
        k = weight.shape[1]
        size = k if group == -1 else group
        order = torch.arange(k) // size
        if act_order:
            columns = torch.randperm(k, generator=torch.Generator().manual_seed(k))
            codes, scales, zeros = integers(weight[:, columns], bits, size, symmetric)
            order = order[columns.argsort()]
            codes = codes[:, columns.argsort()]
        else:
            codes, scales, zeros = integers(weight, bits, size, symmetric)
        tensors = {
            "qweight": words(codes, bits).T,
            "qzeros": words((zeros if v2 else zeros - 1).T.contiguous(), bits),
            "scales": scales.T,
            "g_idx": order.int(),
        }
        return tensors, values_of(codes, scales, zeros, order)

    return written


def awq(group: int = 32) -> Writer:
    def packed(columns: Tensor) -> Tensor:
        """AutoAWQ: position i of a word holds column (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight."""
        eights = columns.view(columns.shape[0], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(eights.reshape(columns.shape), 4)

    def written(weight: Tensor) -> Written:
        codes, scales, zeros = integers(weight, 4, group, symmetric=False)
        tensors = {
            "qweight": packed(codes.T.contiguous()),
            "qzeros": packed(zeros.T.contiguous()),
            "scales": scales.T,
        }
        return tensors, values_of(codes, scales, zeros, torch.arange(weight.shape[1]) // group)

    return written


def fp8(name: str, scale_of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Writer:
    """`scale_of` gives the scale of each weight [N, K] as [1], [N, 1] or by blocks of 64 x 64."""

    def written(weight: Tensor) -> Written:
        scale = scale_of(weight)
        full = scale
        n, k = weight.shape
        if scale.ndim == 2 and len(scale) != n:
            full = torch.stack([scale[i // 64] for i in range(n)])
            full = torch.stack([full[:, j // 64] for j in range(k)], 1)
        codes = (weight / full).to(dtype)
        return {"weight": codes, name: scale}, codes.float() * full

    return written


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0, 0.0052083333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = (*_FP4, *(-value for value in _FP4))
"""The tables of the paper (Dettmers et al. 2023) and of bitsandbytes."""


def four_bits(kind: str = "nf4", block: int = 64, nested: int = 0, words: bool = False) -> Writer:
    """`nested` is the block in which scales are quantised again; with `words` the bytes are stored
    as bfloat16 numbers, for FSDP."""

    def written(weight: Tensor) -> Written:
        table = np.array(NF4 if kind == "nf4" else FP4, np.float32)
        flat = weight.numpy().ravel()
        blocks = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
        scales = np.abs(blocks).max(1)
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16"}
        state["shape"] = list(weight.shape)
        tensors = {"weight.quant_map": table}
        tensors["weight.absmax"] = scales
        if nested:
            inner = np.linspace(-1, 1, 256, dtype=np.float32) ** 3
            offset = np.float32(scales.mean())
            rest = np.pad(scales - offset, (0, -len(scales) % nested)).reshape(-1, nested)
            outer = np.abs(rest).max(1)
            nearest = np.abs((rest / outer[:, None])[..., None] - inner).argmin(-1)
            full = inner[nearest] * outer[:, None] + offset
            tensors["weight.absmax"] = nearest.ravel()[: len(scales)].astype(np.uint8)
            tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": inner}
            state |= {"nested_blocksize": nested, "nested_dtype": "float32"}
            state["nested_offset"] = float(offset)
            scales = full.ravel()[: len(scales)]
        codes = np.abs((blocks / scales[:, None])[..., None] - table).argmin(-1)
        values = (table[codes] * scales[:, None]).ravel()[: len(flat)].reshape(weight.shape)
        pairs = codes.ravel()[: len(flat)].reshape(-1, 2).astype(np.uint8)
        packed = torch.from_numpy(pairs[:, 0] << 4 | pairs[:, 1])
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        parts = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        parts["weight"] = (packed.view(torch.bfloat16) if words else packed)[:, None]
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(text)
        return parts, torch.from_numpy(values)

    return written


def int8_rows(weight: Tensor) -> Written:
    """LLM.int8()."""
    scales = weight.abs().amax(1)
    codes = (weight * (127 / scales)[:, None]).round().to(torch.int8)
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.float() * (scales / 127)[:, None]


def of_tensor(weight: Tensor) -> Tensor:
    return weight.abs().amax().view(1) / 448


def of_rows(weight: Tensor) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / 448


def of_blocks(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return torch.stack(
        [
            torch.stack(
                [weight[i : i + 64, j : j + 64].abs().amax() / 448 for j in range(0, k, 64)]
            )
            for i in range(0, n, 64)
        ]
    )
