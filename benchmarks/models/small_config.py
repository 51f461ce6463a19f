"""A small config of any MoE model type of transformers, made of its default config.

Each field that sets a size gets a small one by its name; lists with an entry for each layer keep
one layer of each kind. What these rules do not find is in `OVERRIDES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

NAMES: dict[int, str] = {
    0: "pad_token_id num_nextn_predict_layers",
    1: "bos_token_id indexer_kv_heads max_window_layers first_k_dense_replace num_dense_layers "
    "n_shared_experts num_shared_experts moe_num_shared_experts decoder_sparse_step "
    "num_sparse_encoder_layers num_sparse_decoder_layers",
    2: "eos_token_id num_key_value_heads swa_num_key_value_heads num_experts_per_tok moe_k "
    "moe_topk num_experts_per_token moe_top_k top_k_experts topk_group o_groups index_kpool "
    "index_topk_blocks linear_num_key_heads n_groups num_layers num_decoder_layers encoder_layers "
    "decoder_layers n_layers depth heads_per_ngram layer_group_size num_registers "
    "split_ngram_parts indexer_compress_ratio",
    3: "moe_layer_end_index",
    4: "num_attention_heads swa_num_attention_heads num_sliding_attention_heads zero_expert_num "
    "n_group num_expert_group index_n_heads index_block_size linear_num_value_heads "
    "linear_num_heads mamba_num_heads mamba_n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads n_heads patch_size indexer_n_heads indexer_budget",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim index_topk "
    "mamba_dt_rank mamba_chunk_size chunk_size sliding_window sliding_window_size d_rel rotary_dim "
    "attention_chunk_size gated_norm_rank loop_gate_rank hc_lowrank window_size keep_window_size",
    16: "head_dim kv_channels swa_head_dim kv_lora_rank o_lora_rank qk_nope_head_dim v_head_dim "
    "index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim ssm_state_size "
    "mamba_d_state d_kv image_size router_hidden_size ple_embed_dim query_pre_attn_scalar "
    "indexer_head_dim part_features",
    24: "q_lora_rank qk_head_dim",
    32: "moe_intermediate_size expert_ffn_hidden_size mamba_head_dim mamba_d_head rel_extent",
    48: "shared_expert_intermediate_size moe_shared_expert_intermediate_size share_expert_dim "
    "shared_intermediate_size",
    64: "hidden_size moe_hidden_size d_model out_hidden_size text_hidden_size expert_capacity "
    "projection_hidden_size vision_hidden_size thinker_hidden_size output_dim adapter_in_dim "
    "adapter_input_size adapter_out_dim audio_hidden_size",
    96: "intermediate_size dense_intermediate_size intermediate_size_mlp ffn_hidden_size d_ff "
    "encoder_ffn_dim decoder_ffn_dim",
    150: "unpadded_vocab_size",
    160: "vocab_size",
    200: "ngram_vocab_size_base",
    512: "max_position_embeddings model_max_length n_positions max_seq_len",
}
SMALL = {name: size for size, names in NAMES.items() for name in names.split()}
LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
)
NEEDED = (
    "num_experts n_routed_experts num_experts_per_tok n_shared_experts top_k_experts "
    "moe_intermediate_size indexer_n_heads indexer_kv_heads indexer_head_dim indexer_budget "
    "indexer_compress_ratio head_dim".split()
)
"""Fields that are None in a default config, without which there is no MoE model."""


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(section),
            **more,
        }
    }


DENSE_FIRST = ["dense", "sparse"]
OVERRIDES: dict[str, dict[str, Any]] = {
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "DbrxFFNConfig": {"ffn_hidden_size": 32, "hidden_size": 64, "ffn_act_fn": {"name": "silu"}},
    "DeepseekOcr2TextConfig": {
        "n_group": 4,
        "topk_group": 2,
        "mlp_layer_types": DENSE_FIRST,
    },
    "DeepseekV2Config": {"n_group": 1, "topk_group": 1},
    "DogeConfig": {"is_moe": True, "num_experts": 16},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [32, 16], **_rope(3, 3, 2)},
    "Gemma4TextConfig": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2},
    "Glm4vMoeTextConfig": _rope(2, 1, 1, partial_rotary_factor=0.5),
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "HYV4VLTextConfig": _rope(2, 1, 1),
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"num_key_value_heads": 4, "head_dim": 8},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 151652},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 48},
    "RadioConfig": {"video_temporal_patch_size": 2},
    "Step3p7TextConfig": {"sliding_window": 8},
    "VitPoseBackboneConfig": {"image_size": [32, 32], "patch_size": [8, 8], "num_experts": 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def _kinds(values: Mapping[str, Any], of: type, most: int = 4) -> dict[str, list[Any]]:
    """The lists by layer, cut to one layer of each kind, two to `most` layers."""
    lists = {
        name: list(values[name]) for name in LISTS if isinstance(values.get(name), list | tuple)
    }
    lists = {k: v for k, v in lists.items() if not isinstance(getattr(of, k, None), property)}
    count = max(map(len, lists.values()), default=0)
    lists = {name: entries for name, entries in lists.items() if len(entries) == count}
    kinds = list(zip(*(map(str, entries) for entries in lists.values()), strict=True))
    first = sorted({kind: kinds.index(kind) for kind in kinds}.values())[:most]
    layers = first if len(first) > 1 else list(range(min(2, count)))
    return {name: [entries[i] for i in layers] for name, entries in lists.items()}


def _fields(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    values = config.to_dict()
    lists = _kinds(values, type(config))
    yield from lists.items()
    latent = "qk_rope_head_dim" in values
    for name, value in values.items():
        if name == "num_hidden_layers" and value:
            yield name, max(map(len, lists.values()), default=2)
        elif name == "mlp_only_layers" and value:
            yield name, []
        elif latent and name == "head_dim":
            continue  # of multi-head latent attention, the part that rotates
        elif name == "num_key_value_heads" and (
            latent or value == values.get("num_attention_heads")
        ):
            yield name, SMALL["num_attention_heads"]
        elif name in SMALL and isinstance(value, int | None) and (value or name in NEEDED):
            yield name, SMALL[name]


def small_config(of: type[PretrainedConfig]) -> PretrainedConfig:
    """A config of that class, of small sizes, with all kinds of layers of the default one."""
    default = of()
    parts = {name: getattr(default, name, None) for name in getattr(of, "sub_configs", {})}
    smaller = {name: small_config(type(part)) for name, part in parts.items() if part is not None}
    return of(**{**dict(_fields(default)), **smaller, **OVERRIDES.get(of.__name__, {})})
