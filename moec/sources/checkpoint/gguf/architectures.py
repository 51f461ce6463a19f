"""llama.cpp's architectures: the models of transformers that compute the same, and what the fields
and tensors of a file are called there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moec.errors import CaptureError

SOFTMAX, SIGMOID = 1, 2
"""Values of expert_gating_func."""
INTEGERS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
REALS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
"""Fields of all architectures, and what transformers calls them."""
OTHERS: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_gating_func": (0, SOFTMAX),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""The values by which fields that an architecture does not map change nothing."""
SAY_NOTHING = (
    *("vocab_size", "attention.value_length", "expert_feed_forward_length"),
    *("expert_shared_feed_forward_length", "expert_shared_count", "nextn_predict_layers"),
)
"""Fields that the shapes of tensors say too."""
SIDES = ("gate", "up", "down")
OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_exps": "mlp.experts",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn_{side}": f"mlp.{side}_proj" for side in SIDES},
    **{f"ffn_{side}_shexp": f"mlp.shared_experts.{side}_proj" for side in SIDES},
}
"""Tensors of a layer, which end in .weight and .bias in both, and those of which only one does."""


@dataclass(frozen=True)
class Architecture:
    """A model of transformers.

    `integers`, `reals` and `flags` are further fields of the file, `fixed` is what llama.cpp's code
    does where no field says. `allowed` are values of fields that are not mapped. `names` are
    further names of a layer's tensors. `present` are configurations that say whether the file has
    a tensor, `rows` are tensors that the model has as one row [1, n]. With `paired`, the rows of q
    and k are stored in pairs; with `in_turn`, the model has the experts' rows of gate and up in
    turn, in transposed stacks.
    """

    model_type: str
    integers: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    reals: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    paired: bool = False
    in_turn: bool = False


_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL = _EXPERTS | {"expert_count": "num_local_experts"}
_ROUTED = _EXPERTS | {
    "expert_count": "n_routed_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
}
_PLAIN = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0}
_NO_NORM = {"expert_weights_norm": (False,)}
_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_LATENT = {"attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank"}
_LATENT_NAMES = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{side}_shexp": f"mlp.shared_expert.{side}_proj" for side in SIDES},
}
_GRANITE_NAMES = {
    "ffn_gate_inp": "block_sparse_moe.router",
    "ffn_exps": "block_sparse_moe.experts",
    "ffn_in_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
_BY_SIGMOID = Architecture(
    "dots1",
    _ROUTED,
    _PLAIN | {"norm_topk_prob": False},
    reals={"expert_weights_scale": "routed_scaling_factor"},
    flags={"expert_weights_norm": "norm_topk_prob"},
    allowed={"expert_gating_func": (0, SIGMOID)},
)
_DEEPSEEK = replace(
    _BY_SIGMOID,
    model_type="deepseek_v3",
    integers=_ROUTED | _LATENT,
    fixed={**_BY_SIGMOID.fixed, "q_lora_rank": None},
    names=_LATENT_NAMES,
)
_GRANITE = Architecture(
    "granite",
    reals={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    allowed={"rope.scaling.finetuned": (True,)},  # llama.cpp rotates nothing where it is false
    present=_BIAS,
    paired=True,
)
_GRANITE_MOE = replace(_GRANITE, model_type="granitemoe", integers=_LOCAL, names=_GRANITE_NAMES)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", present=_BIAS, paired=True),
    "llama with experts": Architecture("mixtral", _LOCAL, paired=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _EXPERTS
        | {
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {"norm_topk_prob": False},
        _SHARED_EXPERT,
        allowed=_NO_NORM,
        rows=("ffn_gate_inp_shexp.weight",),
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        {"norm_topk_prob": True},
    ),
    "olmoe": Architecture("olmoe", _EXPERTS, {"norm_topk_prob": False}, allowed=_NO_NORM),
    "deepseek2": replace(_DEEPSEEK, model_type="deepseek_v2", flags={}, allowed=_NO_NORM),
    "deepseek2 with sigmoid": _DEEPSEEK,
    "granite": _GRANITE,
    "granitemoe": _GRANITE_MOE,
    "granitemoe with shared experts": replace(
        _GRANITE_MOE,
        model_type="granitemoeshared",
        integers=_LOCAL | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        _LOCAL
        | {
            "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": "sliding_window",
        },
        names={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
            "attn_sinks.weight": "self_attn.sinks",
        },
        in_turn=True,
    ),
    "phimoe": Architecture(
        "phimoe",
        _LOCAL | {"attention.sliding_window": "sliding_window"},
        {"sliding_window": None},
        {"ffn_gate_inp": "mlp.router"},
        present=_BIAS | {"lm_head_bias": "output.bias"},
    ),
    "glm4moe": replace(
        _BY_SIGMOID,
        model_type="glm4_moe",
        names={"post_attention_norm": "post_attention_layernorm"},
        present=_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        {
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "moe_num_shared_experts",
            "leading_dense_block_count": "moe_layer_start_index",
            "interleave_moe_layer_step": "moe_layer_interval",
        },
        {"moe_layer_start_index": 0},
        {"exp_probs_b.bias": "mlp.gate.moe_statics.e_score_correction_bias"},
        rows=("exp_probs_b.bias",),
    ),
    "dots1": _BY_SIGMOID,
}
NAMES = tuple(name for name in ARCHITECTURES if " with " not in name)


def architecture_of(fields: Mapping[str, Any]) -> tuple[str, Architecture]:
    """The prefix of the file's fields, and its architecture. Raises CaptureError for others."""
    name = fields.get("general.architecture")
    if not isinstance(name, str) or name not in NAMES:
        raise CaptureError(f"general.architecture is {name!r:.40}; moec reads {', '.join(NAMES)}")
    variants = {
        "llama": ("experts", fields.get("llama.expert_count")),
        "deepseek2": ("sigmoid", fields.get("deepseek2.expert_gating_func") == SIGMOID),
        "granitemoe": (
            "shared experts", fields.get("granitemoe.expert_shared_feed_forward_length"),
        ),
    }  # fmt: skip
    variant, applies = variants.get(name, ("", None))
    return name, ARCHITECTURES[f"{name} with {variant}" if applies else name]
