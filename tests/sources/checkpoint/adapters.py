"""Writes adapters as PEFT does, with the formulas of its documentation for what they do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "r": 4,
    "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["q_proj"], "exclude_modules": None,
    "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
    "modules_to_save": None, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
    "layers_to_transform": None, "layer_replication": None, "megatron_config": None,
    "megatron_core": "megatron.core", "loftq_config": {}, "inference_mode": True,
    "base_model_name_or_path": "org/base", "target_parameters": None, "lora_bias": False,
    "trainable_token_indices": None, "use_qalora": False, "qalora_group_size": 16,
}  # fmt: skip
PREFIX = "base_model.model."


def write(folder: Path, tensors: Mapping[str, Tensor], **fields: object) -> Path:
    folder.mkdir()
    stored = {f"{PREFIX}{name}": tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    return folder


def factors(
    module: str, out: int, inner: int, rank: int = 4, dora: bool = False
) -> dict[str, Tensor]:
    """Random factors of a module [out, inner]."""
    tensors = {
        f"{module}.lora_A.weight": torch.randn(rank, inner) / inner**0.5,
        f"{module}.lora_B.weight": torch.randn(out, rank),
    }
    if dora:
        tensors[f"{module}.lora_magnitude_vector"] = torch.rand(out) + 0.5
    return tensors


def delta(tensors: Mapping[str, Tensor], module: str, scale: float) -> Tensor:
    """s B A in float64."""
    a, b = (tensors[f"{module}.lora_{x}.weight"].double() for x in "AB")
    return scale * (b @ a)


def stacked(tensors: Mapping[str, Tensor], module: str, experts: int, scale: float) -> Tensor:
    """s B A of each expert, [E, out, in], from A [E r, in] and B [out, r E]."""
    a, b = (tensors[f"{module}.lora_{x}.weight"].double() for x in "AB")
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    return scale * torch.einsum("ore,eri->eoi", b, a)


def dora(weight: Tensor, base: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """m (W + s B A) / |W0 + s B A|, the norm of each row."""
    norm = (base.double() + change).pow(2).sum(1, keepdim=True).sqrt()
    return magnitude.double()[:, None] / norm * (weight.double() + change)
