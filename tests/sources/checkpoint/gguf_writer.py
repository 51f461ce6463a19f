"""Writes models of transformers as GGUF files, in the layout of llama.cpp's converter, without
moec's code: names of tensors and fields are those of the package gguf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {
    **{"llama": "llama", "mixtral": "llama", "granite": "granite", "granitemoe": "granitemoe"},
    **{"granitemoeshared": "granitemoe", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"},
    **{"olmoe": "olmoe", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"},
    **{"gpt_oss": "gpt-oss", "phimoe": "phimoe", "glm4_moe": "glm4moe", "dots1": "dots1"},
    **{"ernie4_5_moe": "ernie4_5-moe"},
}
PAIRED = ("llama", "mixtral", "granite", "granitemoe", "granitemoeshared")
_RENAMED = (
    ("gate.e_score_correction_bias", "gate.e_score_correction.bias"),
    ("gate.moe_statics.e_score_correction_bias", "moe_statics.e_score_correction.bias"),
    ("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
    ("sinks", "sinks.weight"),
)
_FIELDS: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "head_count": ("num_attention_heads",),
    "head_count_kv": ("num_key_value_heads",),
    "layer_norm_rms_eps": ("rms_norm_eps",),
    "key_length": ("head_dim",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_k"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_shared_count": ("n_shared_experts", "moe_num_shared_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
    "leading_dense_block_count": ("first_k_dense_replace", "moe_layer_start_index"),
    "interleave_moe_layer_step": ("moe_layer_interval",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "attention_scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "vocab_size": ("vocab_size",),
}
"""By the name of a writer's method, the configurations that hold its value."""
_OF_SIGMOID = ("deepseek_v3", "glm4_moe", "dots1")


def paired(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: those that are rotated together are neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: Any,
    encode: Callable[[str, np.ndarray], tuple[np.ndarray, Any]] | None = None,
    split: bool = True,
    joined: bool = False,
    **changes: Any,
) -> None:
    """`encode(name, weight)` gives the bytes and the type of a tensor, float32 without it. kv_b is
    `split`, gate and up of experts are `joined` or not. `changes` are fields that are other than
    the model's, or absent where they are None."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (_fields(config) | changes).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    numbers = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    for name, weight in _tensors(model, split, joined):
        stem, _, ending = name.rpartition(".")
        stored = names.get_name(stem) or stem
        array, raw = weight.float().contiguous().numpy(), None
        if encode is not None:
            array, raw = encode(f"{stored}.{ending}", array)
        writer.add_tensor(f"{stored}.{ending}", array, raw_dtype=raw)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fields(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for method, keys in _FIELDS.items():
        value = next((v for key in keys if (v := getattr(config, key, None)) is not None), None)
        if value is not None:
            fields[method] = value
    if config.model_type == "gpt_oss":
        fields["expert_feed_forward_length"] = config.intermediate_size
    if config.model_type in ("gpt_oss", "phimoe"):
        fields["sliding_window"] = config.sliding_window or 0
    if config.model_type in _OF_SIGMOID:
        fields["expert_gating_func"] = gguf.ExpertGatingFuncType.SIGMOID
        fields["expert_weights_norm"] = config.norm_topk_prob
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    if "kv_lora_rank" in fields:
        head = config.qk_rope_head_dim
        fields["head_count_kv"] = 1
        fields["key_length"] = config.kv_lora_rank + head
        fields["value_length"] = config.kv_lora_rank
        fields["key_length_mla"] = config.qk_nope_head_dim + head
        fields["value_length_mla"] = config.v_head_dim
    else:
        fields["value_length"] = fields.setdefault("key_length", head)
    fields["rope_dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    fields["rope_freq_base"] = rope["rope_theta"]
    return fields | _scaling(rope)


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] not in ("linear", "yarn"):
        return {}
    fields = {
        "rope_scaling_type": gguf.RopeScalingType(rope["rope_type"]),
        "rope_scaling_factor": rope["factor"],
    }
    if rope["rope_type"] == "yarn":
        fields["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
        fields["rope_scaling_yarn_beta_fast"] = rope["beta_fast"]
        fields["rope_scaling_yarn_beta_slow"] = rope["beta_slow"]
    if "mscale_all_dim" in rope:
        fields["rope_scaling_yarn_log_mul"] = 0.1 * rope["mscale_all_dim"]
    return fields


def _llama3(config: Any) -> np.ndarray:
    """The factors of frequencies, as llama.cpp's converter computes them."""
    rope, width = config.rope_parameters, config.hidden_size // config.num_attention_heads
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    wavelengths = 2 * np.pi * rope["rope_theta"] ** exponents
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _tensors(model: Any, split: bool, joined: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors under names that the package maps, split as llama.cpp has them."""
    config = model.config
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for old, new in _RENAMED:
            name = name.replace(old, new) if name.endswith(old) else name
        stem, _, part = name.rpartition(".")
        if part.removesuffix("_bias") in ("gate_up_proj", "down_proj"):
            yield from _experts(config, stem, part, weight, joined)
        elif stem.endswith("kv_b_proj") and split:
            sizes = [config.qk_nope_head_dim, config.v_head_dim]
            k, v = weight.view(config.num_attention_heads, sum(sizes), -1).split(sizes, 1)
            yield f"{stem[:-9]}k_b_proj.weight", k.mT
            yield f"{stem[:-9]}v_b_proj.weight", v
        elif stem.endswith("shared_mlp.input_linear"):
            layer = stem.removesuffix("shared_mlp.input_linear")
            for side, half in zip(("gate", "up"), weight.chunk(2), strict=True):
                yield f"{layer}mlp.shared_experts.{side}_proj.weight", half
        elif config.model_type in PAIRED and stem.endswith(("q_proj", "k_proj")):
            key = "num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"
            yield name, paired(weight, getattr(config, key))
        else:
            yield name, weight


def _experts(
    config: Any, stem: str, part: str, weight: Tensor, joined: bool
) -> Iterator[tuple[str, Tensor]]:
    stem = stem.replace("block_sparse_moe", "mlp")
    ending = "bias" if part.endswith("_bias") else "weight"
    turned = config.model_type == "gpt_oss"
    weight = weight.mT if turned and ending == "weight" else weight
    if part.startswith("down_proj"):
        yield f"{stem}.down_proj.{ending}", weight
        return
    if joined:
        yield f"blk.{stem.split('.')[2]}.ffn_gate_up_exps.weight", weight
        return
    halves = (weight[:, 0::2], weight[:, 1::2]) if turned else weight.chunk(2, 1)
    for side, half in zip(("gate", "up"), halves, strict=True):
        yield f"{stem}.{side}_proj.{ending}", half
