"""What a GGUF file says of its model: a configuration of transformers, and names of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moec.errors import CaptureError
from moec.files.gguf import GgufHeader

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
}
"""llama.cpp's architectures; a llama with experts is a mixtral."""
FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {"norm_topk_prob": False},
    "olmoe": {"norm_topk_prob": False},
}
"""What llama.cpp's code does, and no field says."""
_REFUSED = {
    "rope.scaling.type": ("none",),
    "expert_gating_func": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
}
"""Fields whose other values change the model in ways that are not mapped."""
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def configuration(header: GgufHeader) -> dict[str, Any]:
    """The configuration, with `model_type`. Raises CaptureError for an architecture or a field
    that moec does not map."""
    fields = header.fields
    architecture = fields.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise CaptureError(
            f"general.architecture is {architecture!r}; moec reads {', '.join(MODEL_TYPES)}"
        )
    model_type = MODEL_TYPES[architecture]
    experts = _integer(fields, f"{architecture}.expert_count", 0)
    if model_type == "llama" and experts:
        model_type = "mixtral"
    for name, allowed in _REFUSED.items():
        value = fields.get(f"{architecture}.{name}", allowed[0])
        if value not in allowed:
            raise CaptureError(f"{architecture}.{name} is {value!r}, which moec does not map")
    config: dict[str, Any] = {"model_type": model_type, **_FIXED.get(model_type, {})}
    for name, key in FIELDS.items():
        value = fields.get(f"{architecture}.{name}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CaptureError(f"{architecture}.{name} is {str(value)[:40]}, not one number")
        config[key] = value
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise CaptureError(f"the file says no {name} of {architecture}")
    if experts:
        config["num_local_experts" if model_type == "mixtral" else "num_experts"] = experts
    theta = fields.get(f"{architecture}.rope.freq_base", 10000.0)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if "token_embd.weight" in header.tensors:
        config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    for token in ("bos", "eos"):
        config[f"{token}_token_id"] = fields.get(f"tokenizer.ggml.{token}_token_id")
    return config


def _integer(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or value < 0:
        raise CaptureError(f"{name} is {str(value)[:40]}, not a number of things")
    return value


def model_name(name: str) -> str:
    """transformers' name of a tensor. Unknown names stay, so that nothing reads them."""
    if name in _OUTER:
        return _OUTER[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _INNER:
        return name
    return f"model.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"
