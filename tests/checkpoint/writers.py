"""Writes a model's checkpoint in the layout of each format, as published, without moec's code.

Each writer takes the weight f32[N, K] of a linear layer and gives the tensors that the format
stores for it, and its values: the float32 weight that a reader must see.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
