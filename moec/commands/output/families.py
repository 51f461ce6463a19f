"""The models that moec is tested with, for `moec list models` and the README."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFamily:
    """A family of transformers. `what` describes the peculiarities of its MoE blocks."""

    model_type: str
    architecture: str
    what: str


FAMILIES = (
    ModelFamily("mixtral", "MixtralForCausalLM", "softmax of the chosen logits"),
    ModelFamily("qwen2_moe", "Qwen2MoeForCausalLM", "a shared expert with a sigmoid gate"),
    ModelFamily("qwen3_moe", "Qwen3MoeForCausalLM", "renormalised softmax"),
    ModelFamily("olmoe", "OlmoeForCausalLM", "softmax before top-k"),
    ModelFamily("deepseek_v2", "DeepseekV2ForCausalLM", "groups of experts, shared experts, MLA"),
    ModelFamily(
        "deepseek_v3", "DeepseekV3ForCausalLM", "sigmoid with correction bias, groups, MLA"
    ),
    ModelFamily(
        "gpt_oss", "GptOssForCausalLM", "interleaved gate and up with clamp, biases, sinks"
    ),
    ModelFamily("granitemoe", "GraniteMoeForCausalLM", "softmax after top-k"),
    ModelFamily("phimoe", "PhimoeForCausalLM", "sparsemixer"),
    ModelFamily(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        "top-1 with capacity, encoder and decoder",
    ),
    ModelFamily("jetmoe", "JetMoeForCausalLM", "attention made of experts too"),
    ModelFamily("llama4_text", "Llama4ForCausalLM", "sigmoid top-1, weights on the input side"),
    ModelFamily("glm4_moe", "Glm4MoeForCausalLM", "sigmoid with correction bias, groups"),
    ModelFamily("glm4_moe_lite", "Glm4MoeLiteForCausalLM", "sigmoid with correction bias, MLA"),
    ModelFamily("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "softmax with correction bias"),
    ModelFamily("minimax_m2", "MiniMaxM2ForCausalLM", "sigmoid with correction bias"),
    ModelFamily(
        "granitemoeshared", "GraniteMoeSharedForCausalLM", "a shared expert without a gate"
    ),
    ModelFamily("gemma4_text", "Gemma4ForCausalLM", "a factor per expert, next to a dense MLP"),
    ModelFamily("lfm2_moe", "Lfm2MoeForCausalLM", "short convolutions between the blocks"),
    ModelFamily("mimo_v2_flash", "MiMoV2FlashForCausalLM", "sliding windows with sinks"),
    ModelFamily("cohere2_moe", "Cohere2MoeForCausalLM", "attention and experts side by side"),
    ModelFamily("aria_text", "AriaTextForCausalLM", "transposed weights"),
    ModelFamily(
        "qwen3_next", "Qwen3NextForCausalLM", "gated delta rule, a shared expert with a gate"
    ),
    ModelFamily("kimi_linear", "KimiLinearForCausalLM", "delta rule with a decay per channel, MLA"),
    ModelFamily("granitemoehybrid", "GraniteMoeHybridForCausalLM", "Mamba 2, a shared expert"),
    ModelFamily("nemotron_h", "NemotronHForCausalLM", "Mamba 2, experts without a gate"),
    ModelFamily("deepseek_v32", "DeepseekV32ForCausalLM", "as deepseek_v3, with sparse attention"),
    ModelFamily("minimax", "MiniMaxForCausalLM", "lightning attention, renormalised softmax"),
    ModelFamily("longcat_flash", "LongcatFlashForCausalLM", "experts that copy their rows"),
    ModelFamily("jamba", "JambaForCausalLM", "Mamba, softmax before top-k"),
)

FORMS = {
    "hf experts op": "experts that transformers decorates with use_experts_implementation",
    "static loop": "a loop over the experts: torch.where and index_add_, or masks",
    "gathered weights": "each token's expert weights gathered, then bmm",
    "sort + grouped_mm": "rows sorted by expert, then grouped_mm",
    "dense dispatch with capacity": "einsum with a dispatch mask, tokens dropped (GShard)",
    "evaluate all, then select": "every expert evaluated, then selected or masked",
}
