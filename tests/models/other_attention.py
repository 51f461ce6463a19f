"""Families whose attention is not always causal attention over all tokens: linear attention and
convolutions, an indexer that chooses tokens, relative positions."""

from __future__ import annotations

from typing import Any

from tests.models.families import Family
from tests.models.fields import (
    DELTA_RULE,
    DENSE_FIRST,
    EXPERTS,
    GROUPS,
    HYBRID,
    INDEXER,
    LOCAL,
    MLA,
    ROUTED,
    WIDTHS,
)

_RELATIVE: dict[str, Any] = {
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 8,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "unpadded_vocab_size": 150,
}

OTHER_ATTENTION: dict[str, Family] = {
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
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**EXPERTS, **WIDTHS, **DELTA_RULE, **HYBRID, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {
            **EXPERTS,
            **DELTA_RULE,
            **HYBRID,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "lara_mini": Family(
        "LaraMiniForCausalLM",
        "LaraMiniConfig",
        {
            **EXPERTS,
            **DELTA_RULE,
            "layer_types": ["linear_attention", "sliding_attention"],
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "sliding_window": 8,
        },
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
    "bailing_hybrid": Family(
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        {
            **LOCAL,
            **WIDTHS,
            **MLA,
            **GROUPS,
            **HYBRID,
            **DENSE_FIRST,
            "q_lora_rank": None,
            "head_dim": 16,
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
    "glm_moe_dsa": Family(
        "GlmMoeDsaForCausalLM",
        "GlmMoeDsaConfig",
        {**MLA, **ROUTED, **WIDTHS, **DENSE_FIRST, **INDEXER},
    ),
    "axk2": Family(
        "AXK2ForCausalLM",
        "AXK2Config",
        {**MLA, **ROUTED, **WIDTHS, **DENSE_FIRST, **INDEXER, "gated_norm_rank": 8},
    ),
    "hy_v4": Family(
        "HYV4ForCausalLM",
        "HYV4Config",
        {**MLA, **ROUTED, **WIDTHS, **DENSE_FIRST, **INDEXER},
    ),
    "dots3_note": Family(
        "Dots3NoteForCausalLM",
        "Dots3NoteTextConfig",
        {
            **MLA,
            **ROUTED,
            **WIDTHS,
            **DENSE_FIRST,
            **INDEXER,
            "shared_experts_intermediate_size": 48,
            "sliding_window": 8,
        },
    ),
    "mistral_large4": Family(
        "MistralLarge4TextModel",
        "MistralLarge4TextConfig",
        {**MLA, **ROUTED, **WIDTHS, **DENSE_FIRST, **INDEXER},
    ),
    "inkling": Family(
        "InklingForCausalLM",
        "InklingTextConfig",
        {
            **ROUTED,
            **WIDTHS,
            **DENSE_FIRST,
            **_RELATIVE,
        },
    ),
    "inkling2": Family(
        "Inkling2ForCausalLM",
        "Inkling2TextConfig",
        {
            **ROUTED,
            "moe_intermediate_size": 32,
            **_RELATIVE,
            "n_layers_per_attn_res_block": 1,
        },
    ),
    "openai_privacy_filter": Family(
        "OpenAIPrivacyFilterForTokenClassification",
        "OpenAIPrivacyFilterConfig",
        {**LOCAL, "intermediate_size": 32, "head_dim": 16, "sliding_window": 8},
    ),
}
