"""Small random models of the Hugging Face families, by name: config and example inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 160
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """How to build a small model: class names in transformers and the config's fields."""

    model: str
    config: str
    fields: dict[str, Any]

    def one_layer(self) -> Family:
        """The family with one layer, which has experts. Switch has one in the encoder and one in
        the decoder."""
        fewer = {"num_hidden_layers": 1}
        if "first_k_dense_replace" in self.fields:
            fewer |= {"first_k_dense_replace": 0}
        if self.model.startswith("Switch"):
            fewer |= {"num_layers": 1, "num_decoder_layers": 1}
        return replace(self, fields={**self.fields, **fewer})

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """A model with random weights, in eval mode."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**_COMMON, **self.fields})
        model = getattr(transformers, self.model)(config)
        # Zero-initialised biases and all-one norms would hide errors in their place.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        return model.to(dtype).eval()

    def inputs(self, batch: int, sequence: int, seed: int = 1) -> dict[str, Any]:
        torch.manual_seed(seed)

        def tokens() -> torch.Tensor:
            return torch.randint(3, VOCABULARY, (batch, sequence))

        if self.model.startswith("Switch"):
            return {
                "input_ids": tokens(),
                "attention_mask": torch.ones(batch, sequence, dtype=torch.int64),
                "decoder_input_ids": tokens(),
                "decoder_attention_mask": torch.ones(batch, sequence, dtype=torch.int64),
                "use_cache": False,
            }
        return {"input_ids": tokens(), "use_cache": False}


def _causal(name: str, **fields: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", fields)


_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

FAMILIES: dict[str, Family] = {
    "mixtral": _causal("Mixtral", intermediate_size=96, num_local_experts=4),
    "qwen2_moe": _causal(
        "Qwen2Moe",
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen3_moe": _causal(
        "Qwen3Moe",
        intermediate_size=96,
        moe_intermediate_size=32,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "olmoe": _causal("Olmoe", intermediate_size=32, num_experts=8, num_experts_per_tok=2),
    "deepseek_v2": _causal("DeepseekV2", **_DEEPSEEK, n_group=1, topk_group=1),
    "deepseek_v3": _causal("DeepseekV3", **_DEEPSEEK, n_group=4, topk_group=2),
    "gpt_oss": _causal(
        "GptOss",
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=8,
    ),
    "granitemoe": _causal(
        "GraniteMoe", intermediate_size=32, num_local_experts=8, num_experts_per_tok=2
    ),
    "phimoe": _causal("Phimoe", intermediate_size=32, num_local_experts=4, num_experts_per_tok=2),
    "switch_transformers": Family(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_decoder_layers": 2,
            "num_sparse_decoder_layers": 1,
            "num_heads": 4,
            "num_experts": 4,
            "expert_capacity": 64,
            "decoder_start_token_id": 0,
        },
    ),
    "jetmoe": _causal(
        "JetMoe",
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_channels=16,
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "intermediate_size": 32,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "attention_chunk_size": 64,
        },
    ),
}

VARYING = ("deepseek_v2", "gpt_oss")
"""Their layers differ: the first is dense; the first attention has a window."""
SMALL = {name: f if name in VARYING else f.one_layer() for name, f in FAMILIES.items()}
"""With as few layers as show all code of the families; DeepSeek-V3's dense layer is V2's."""
