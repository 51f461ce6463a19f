"""More families of transformers, which moec has no special code for, unmodified: of multimodal ones
the text part, and some whose attention is not always over all earlier tokens.
"""

from __future__ import annotations

from typing import Any

from tests.models.families import Family

MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
WIDTHS: dict[str, Any] = {"intermediate_size": 96, "moe_intermediate_size": 32}
DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
INDEXER: dict[str, Any] = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_RULE: dict[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
}

OTHER_FAMILIES: dict[str, Family] = {
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **GROUPS,
            **ROUTED,
            **WIDTHS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        {
            **MLA,
            **GROUPS,
            **ROUTED,
            **WIDTHS,
            **DENSE_FIRST,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
        },
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            **WIDTHS,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {**LOCAL, "intermediate_size": 96, "head_dim": 16},
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {**LOCAL, "intermediate_size": 96, "shared_intermediate_size": 48},
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **WIDTHS,
            "num_experts": 8,
            "head_dim": 16,
            "sliding_window": 8,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 160,
            "hidden_size_per_layer_input": 16,
            "per_layer_config": {"01": {"head_dim": 32}},
        },
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            **EXPERTS,
            **WIDTHS,
            "num_dense_layers": 1,
            "norm_topk_prob": True,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        "MiMoV2FlashConfig",
        {
            **GROUPS,
            **ROUTED,
            **WIDTHS,
            **DENSE_FIRST,
            "head_dim": 16,
            "v_head_dim": 16,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "aria_text": Family(
        "AriaTextForCausalLM",
        "AriaTextConfig",
        {
            "intermediate_size": 96,
            "moe_num_experts": 8,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
            "head_dim": 16,
        },
    ),
    "cohere2_moe": Family(
        "Cohere2MoeForCausalLM",
        "Cohere2MoeConfig",
        {
            **EXPERTS,
            **DENSE_FIRST,
            "intermediate_size": 96,
            "num_shared_experts": 1,
            "head_dim": 16,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeTextModel",
        "Qwen3VLMoeTextConfig",
        {**LOCAL, **WIDTHS, "head_dim": 16, "sliding_window": 8},
    ),
    "muse_spark": Family(
        "MuseSparkTextModel",
        "MuseSparkTextConfig",
        {
            **LOCAL,
            **WIDTHS,
            **DENSE_FIRST,
            "head_dim": 16,
            "sliding_window": 8,
            "moe_hidden_size": 64,
            "layer_rope_theta": [10000.0, 0],
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**EXPERTS, **WIDTHS, **DELTA_RULE, **HYBRID, "shared_expert_intermediate_size": 48},
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {
            **LOCAL,
            **WIDTHS,
            **MLA,
            **HYBRID,
            **DENSE_FIRST,
            "q_lora_rank": None,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **LOCAL,
            "intermediate_size": 96,
            "shared_intermediate_size": 48,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **ROUTED,
            "layers_block_type": ["mamba", "moe", "attention"],
            "num_hidden_layers": 3,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
    "jamba": Family(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **EXPERTS,
            "intermediate_size": 96,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
        },
    ),
    "minimax": Family(
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {**LOCAL, **HYBRID, "intermediate_size": 96, "head_dim": 16, "block_size": 16},
    ),
    "longcat_flash": Family(
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            **MLA,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 6,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "head_dim": 8,
        },
    ),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        {**MLA, **GROUPS, **ROUTED, **WIDTHS, **DENSE_FIRST, **INDEXER},
    ),
}
