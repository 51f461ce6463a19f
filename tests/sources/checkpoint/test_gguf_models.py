"""Architectures of GGUF: the model of a file has the weights and logits of the one that it was
written from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moec
from moec.capture.doors import open_source
from moec.errors import CaptureError
from moec.ir.formats.integer import dequantise
from tests.sources.checkpoint.families import COMMON
from tests.sources.checkpoint.gguf_writer import gguf, write

LATENT = {
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16},
    **{"v_head_dim": 16, "num_key_value_heads": 4},
}
ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE = {
    **{"embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "attention_multiplier": 0.2,
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0},
    **{"original_max_position_embeddings": 16, "beta_slow": 1.0},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": False}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}},
    ),
    "mixtral": ("mixtral", LOCAL),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe, yarn": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"head_dim": 16, "norm_topk_prob": True, "rope_parameters": YARN},
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "deepseek_v2": ("deepseek_v2", LATENT | ROUTED | {"topk_method": "greedy"}),
    "deepseek_v2, lite": (
        "deepseek_v2",
        LATENT
        | ROUTED
        | {"q_lora_rank": None, "topk_method": "greedy"}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT | ROUTED | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v3, yarn": (
        "deepseek_v3",
        LATENT
        | ROUTED
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "granite": ("granite", GRANITE),
    "granitemoe": ("granitemoe", LOCAL | GRANITE | {"tie_word_embeddings": True}),
    "granitemoeshared": ("granitemoeshared", LOCAL | GRANITE | {"shared_intermediate_size": 32}),
    "gpt_oss": (
        "gpt_oss",
        LOCAL
        | {"head_dim": 64, "sliding_window": 4}
        | {"rope_parameters": YARN | {"truncate": False}},
    ),
    "phimoe": (
        "phimoe",
        LOCAL
        | {"attention_bias": True, "lm_head_bias": True, "sliding_window": None}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "glm4_moe": (
        "glm4_moe",
        ROUTED | {"head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}
        | {"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "tie_word_embeddings": True},
    ),
    "dots1": (
        "dots1",
        ROUTED | {"head_dim": 16, "num_key_value_heads": 4, "norm_topk_prob": True},
    ),
}  # fmt: skip
TOKENS = torch.randint(96, (2, 13), generator=torch.Generator().manual_seed(1))


def built(family: str, changes: dict[str, Any]) -> Any:
    """A model in float32 with weights so large that every part of it matters."""
    config = AutoConfig.for_model(family, **COMMON | {"initializer_range": 0.15} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        for key, tensor in model.state_dict().items():
            if "router" in key or ".gate." in key or "sinks" in key:
                tensor.normal_(0, 0.3)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_logits(name, tmp_path):
    """Float32 weights: the same numbers, so the same logits bit for bit, and hence the same
    configuration as far as it is computed with."""
    model = built(*MODELS[name])
    write(tmp_path / "model.gguf", model)
    read = open_source(tmp_path / "model.gguf").model
    expected = model.state_dict()
    assert read.state_dict().keys() == expected.keys()
    for key, tensor in read.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert read.config.model_type == MODELS[name][0]
    assert torch.equal(logits(read), logits(model))


def test_factors_of_frequencies(tmp_path):
    """The factors are rounded to float32, and so differ from a product by 2^-24 or so."""
    model = built("llama", {"rope_parameters": LLAMA3})
    write(tmp_path / "model.gguf", model)
    read = open_source(tmp_path / "model.gguf").model
    rotary, expected = read.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    assert torch.allclose(rotary, expected, rtol=1e-6, atol=0)
    assert (logits(read) - logits(model)).norm() < 1e-5 * logits(model).norm()


def test_latent_attention_of_older_files(tmp_path):
    """They have kv_b in one, and the sizes of the model's heads under the common names."""
    model = built(*MODELS["deepseek_v2"])
    config = model.config
    sizes = {
        "key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "value_length": config.v_head_dim,
        "head_count_kv": config.num_attention_heads,
    }
    unsplit = {"key_length_mla": None, "value_length_mla": None}
    write(tmp_path / "model.gguf", model, split=False, **sizes, **unsplit)
    assert torch.equal(logits(open_source(tmp_path / "model.gguf").model), logits(model))


def test_experts_in_one_tensor(tmp_path):
    """llama.cpp's converter joins gate and up if it is told to."""
    model = built(*MODELS["mixtral"])
    write(tmp_path / "model.gguf", model, joined=True)
    assert torch.equal(logits(open_source(tmp_path / "model.gguf").model), logits(model))


def test_blocks_that_predict_further_tokens_are_not_read(tmp_path):
    family, changes = MODELS["glm4_moe"]
    model = built(family, changes | {"num_hidden_layers": 3})
    write(tmp_path / "model.gguf", model, nextn_predict_layers=1)
    read = open_source(tmp_path / "model.gguf").model
    assert read.config.num_hidden_layers == 2
    model.config.num_hidden_layers = 2
    del model.model.layers[2]
    assert torch.equal(logits(read), logits(model))


_STORED = tuple(f"{part}.weight" for part in ("exps", "shexp", "attn_q", "attn_k", "v_b"))


def encoded(name: str, weight: np.ndarray) -> tuple[np.ndarray, Any]:
    """Matrices of experts and attention in MXFP4 or Q8_0, as llama.cpp's files have them."""
    if weight.ndim < 2 or weight.shape[-1] % 32 or not name.endswith(_STORED):
        return weight, None
    kind = gguf.GGMLQuantizationType.MXFP4 if "exps" in name else gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.quantize(weight, kind), kind


@pytest.mark.parametrize(
    ("name", "rounded"),
    [("gpt_oss", 0), ("granitemoeshared", 0), ("qwen2_moe", 0), ("deepseek_v2", 2)],
)
def test_codes_of_joined_weights(name, rounded, tmp_path):
    """Codes are joined, reordered and transposed as values are; those of kv_b, which is stored
    across its rows, are rounded again."""
    model = built(*MODELS[name])
    write(tmp_path / "model.gguf", model, encoded)
    source = open_source(tmp_path / "model.gguf")
    arranged = source.codes()
    assert len(arranged.nearest) == rounded
    assert all("stored across" in reason for _, reason in arranged.nearest.values())
    state = source.model.state_dict()
    assert any("experts.gate_up_proj" in key for key in arranged.stored)
    for key, stored in arranged.stored.items():
        parts = stored.parts
        codes = parts.codes.mT if stored.transposed else parts.codes
        scales = parts.scales.mT if stored.transposed else parts.scales
        values = dequantise(stored.format.kind, codes, scales, None)
        values = values.mT if stored.transposed else values
        assert torch.equal(values.to(state[key].dtype), state[key]), key


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3, yarn", "granitemoeshared"])
def test_compiled(name, tmp_path):
    """The compiled model against eager, float32: sums in another order differ by 2^-20 or so."""
    model = built(*MODELS[name])
    write(tmp_path / "model.gguf", model)
    compiled = moec.compile(tmp_path / "model.gguf")
    assert (compiled(TOKENS) - logits(model)).norm() < 1e-5 * logits(model).norm()


REFUSED = [
    ("llama", {"rope_scaling_type": gguf.RopeScalingType.LONGROPE}, "scaling.type is 'longrope'"),
    ("llama", {"rope_scaling_attn_factors": 1.5}, "rope.scaling.attn_factor is not 1, which moec"),
    ("llama", {"rope_dimension_count": 8}, "rope.dimension_count is 8, and heads have 16"),
    ("llama", {"logit_scale": 2.0}, "llama.logit_scale is 2.0, which moec does not map"),
    ("llama", {"sliding_window": 32}, "attention.sliding_window is 32, which moec does not map"),
    ("qwen2_moe", {"expert_weights_norm": True}, "expert_weights_norm is True, which moec does"),
    ("mixtral", {"expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID}, "gating_func is 2"),
    ("mixtral", {"expert_weights_scale": 2.0}, "expert_weights_scale is 2.0, which moec does not"),
    ("granitemoe", {"rope_scaling_finetuned": False}, "rope.scaling.finetuned is False, which"),
    ("qwen3_moe, yarn", {"rope_scaling_yarn_log_mul": 0.1}, "yarn_log_multiplier is not mapped"),
    ("qwen3_moe, yarn", {"rope_scaling_yarn_ext_factor": 0.5}, "yarn_ext_factor is not 1, which"),
    ("deepseek_v2", {"expert_weights_norm": True}, "deepseek2.expert_weights_norm is True, which"),
    ("deepseek_v2", {"rope_dimension_count": 24}, "rope.dimension_count is 24 of 24"),
    ("glm4_moe", {"expert_gating_func": gguf.ExpertGatingFuncType.SOFTMAX}, "gating_func is 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED)
def test_fields_that_are_not_mapped(name, changes, words, tmp_path):
    write(tmp_path / "model.gguf", built(*MODELS[name]), **changes)
    with pytest.raises(CaptureError, match=words) as caught:
        open_source(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
