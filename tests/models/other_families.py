"""More families of transformers, which nothing in moec was written for: tried as they are.

Text models only; of families that also see or hear, their text part.
"""

from __future__ import annotations

from typing import Any

from tests.models.families import Family

_MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
_ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
_WIDTHS: dict[str, Any] = {"intermediate_size": 96, "moe_intermediate_size": 32}
_DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}

OTHER_FAMILIES: dict[str, Family] = {
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **_GROUPS,
            **_ROUTED,
            **_WIDTHS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        {
            **_MLA,
            **_GROUPS,
            **_ROUTED,
            **_WIDTHS,
            **_DENSE_FIRST,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
        },
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            **_WIDTHS,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {**_LOCAL, "intermediate_size": 96, "head_dim": 16},
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {"intermediate_size": 96, "num_experts": 8, "moe_topk": 2, "head_dim": 16},
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {**_LOCAL, "intermediate_size": 96, "shared_intermediate_size": 48},
    ),
    "granitemoe_swa": Family(
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSWAConfig",
        {**_LOCAL, "intermediate_size": 96, "shared_intermediate_size": 48, "sliding_window": 8},
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_WIDTHS,
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
    "dots1": Family(
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            **_GROUPS,
            **_ROUTED,
            **_WIDTHS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            **_EXPERTS,
            **_WIDTHS,
            "num_dense_layers": 1,
            "norm_topk_prob": True,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "flex_olmo": Family(
        "FlexOlmoForCausalLM",
        "FlexOlmoConfig",
        {**_EXPERTS, "intermediate_size": 96, "norm_topk_prob": True},
    ),
    "dbrx": Family(
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "ffn_hidden_size": 32,
                "moe_num_experts": 8,
                "moe_top_k": 2,
                "hidden_size": 64,
                "ffn_act_fn": {"name": "silu"},
            },
        },
    ),
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        "MiMoV2FlashConfig",
        {
            **_GROUPS,
            **_ROUTED,
            **_WIDTHS,
            **_DENSE_FIRST,
            "head_dim": 16,
            "v_head_dim": 16,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "afmoe": Family(
        "AfmoeForCausalLM",
        "AfmoeConfig",
        {
            **_EXPERTS,
            **_WIDTHS,
            "num_shared_experts": 1,
            "head_dim": 16,
            "num_dense_layers": 1,
            "sliding_window": 8,
        },
    ),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        "ExaoneMoeConfig",
        {
            **_GROUPS,
            **_EXPERTS,
            **_WIDTHS,
            **_DENSE_FIRST,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "solar_open": Family(
        "SolarOpenForCausalLM",
        "SolarOpenConfig",
        {
            **_GROUPS,
            **_ROUTED,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "head_dim": 16,
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
            **_EXPERTS,
            **_DENSE_FIRST,
            "intermediate_size": 96,
            "num_shared_experts": 1,
            "head_dim": 16,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "mistral4": Family(
        "Mistral4ForCausalLM",
        "Mistral4Config",
        {
            **_MLA,
            **_GROUPS,
            **_ROUTED,
            **_WIDTHS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
    ),
    "hy_v3": Family(
        "HYV3ForCausalLM",
        "HYV3Config",
        {**_EXPERTS, **_WIDTHS, **_DENSE_FIRST, "num_shared_experts": 1, "head_dim": 16},
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeTextModel",
        "Qwen3VLMoeTextConfig",
        {**_LOCAL, **_WIDTHS, "head_dim": 16, "sliding_window": 8},
    ),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeThinkerTextModel",
        "Qwen3OmniMoeTextConfig",
        {**_EXPERTS, **_WIDTHS, "sliding_window": 8, "norm_topk_prob": True},
    ),
    "glm4v_moe": Family(
        "Glm4vMoeTextModel",
        "Glm4vMoeTextConfig",
        {
            **_GROUPS,
            **_ROUTED,
            **_WIDTHS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            },
        },
    ),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeTextModel",
        "Ernie4_5_VLMoeTextConfig",
        {
            **_DENSE_FIRST,
            "intermediate_size": 96,
            "moe_intermediate_size": [32, 16],
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [3, 3, 2],
            },
        },
    ),
    "muse_spark": Family(
        "MuseSparkTextModel",
        "MuseSparkTextConfig",
        {
            **_LOCAL,
            **_WIDTHS,
            **_DENSE_FIRST,
            "head_dim": 16,
            "sliding_window": 8,
            "moe_hidden_size": 64,
            "layer_rope_theta": [10000.0, 0],
        },
    ),
    "mellum": Family(
        "MellumForCausalLM",
        "MellumConfig",
        {
            **_LOCAL,
            **_WIDTHS,
            **_DENSE_FIRST,
            "head_dim": 16,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "laguna": Family(
        "LagunaForCausalLM",
        "LagunaConfig",
        {
            **_EXPERTS,
            **_WIDTHS,
            **_DENSE_FIRST,
            "shared_expert_intermediate_size": 48,
            "head_dim": 16,
            "sliding_window": 8,
            "num_attention_heads_per_layer": [4, 4],
        },
    ),
    "kolibri1": Family(
        "Kolibri1ForCausalLM",
        "Kolibri1Config",
        {
            **_LOCAL,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "head_dim": 16,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "flint": Family(
        "FlintForCausalLM",
        "FlintConfig",
        {
            **_EXPERTS,
            **_WIDTHS,
            "shared_expert_intermediate_size": 48,
            "head_dim": 16,
            "sliding_window": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "axk1": Family(
        "AXK1ForCausalLM",
        "AXK1Config",
        {
            **_MLA,
            **_GROUPS,
            **_ROUTED,
            **_WIDTHS,
            **_DENSE_FIRST,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
        },
    ),
    "beam": Family(
        "BeamForCausalLM",
        "BeamConfig",
        {
            **_GROUPS,
            **_EXPERTS,
            **_WIDTHS,
            **_DENSE_FIRST,
            "head_dim": 16,
            "sliding_window": 8,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_ocr2": Family(
        "DeepseekOcr2TextModel",
        "DeepseekOcr2TextConfig",
        {**_GROUPS, **_ROUTED, **_WIDTHS, **_DENSE_FIRST, "n_shared_experts": 1, "head_dim": 16},
    ),
    "unlimited_ocr": Family(
        "UnlimitedOcrTextModel",
        "UnlimitedOcrTextConfig",
        {
            **_GROUPS,
            **_ROUTED,
            **_WIDTHS,
            **_DENSE_FIRST,
            "n_shared_experts": 1,
            "head_dim": 16,
            "sliding_window": 8,
        },
    ),
    "step3p7": Family(
        "Step3p7TextModel",
        "Step3p7TextConfig",
        {**_ROUTED, **_WIDTHS, **_DENSE_FIRST, "head_dim": 16, "sliding_window": 8},
    ),
    "minimax_m3_vl": Family(
        "MiniMaxM3VLForCausalLM",
        "MiniMaxM3VLTextConfig",
        {
            **_LOCAL,
            **_DENSE_FIRST,
            "intermediate_size": 96,
            "shared_intermediate_size": 48,
            "head_dim": 16,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "dense_intermediate_size": 96,
            "rotary_dim": 8,
        },
    ),
    "zaya": Family(
        "ZayaForCausalLM",
        "ZayaConfig",
        {
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "sliding_window": 8,
            "router_hidden_size": 16,
        },
    ),
}
