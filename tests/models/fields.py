"""Fields of configs that small models of many families share."""

from __future__ import annotations

from typing import Any

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
