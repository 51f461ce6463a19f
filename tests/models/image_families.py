"""Small random models of families with images, and their inputs: one image of 16 patches a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 160
IMAGE, VIDEO = 7, 8
"""The ids of the tokens that hold the place of an image's and of a video's features."""
FEATURES = 4
"""The features of one image: 4 x 4 patches, of which 2 x 2 are merged."""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
}
_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"rope_parameters": parameters | more}


@dataclass(frozen=True)
class ImageFamily:
    """How to build a small model: class names in transformers, and fields of the configs.

    `patch` is the number of values of one patch; None where images are given whole, as pixels.
    `types` says whether the model takes the type of each token.
    """

    model: str
    config: str
    vision: dict[str, Any]
    text: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    patch: int | None = None
    types: bool = True

    def build(self) -> torch.nn.Module:
        """A model with random weights, in eval mode."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(
            vision_config=self.vision, text_config={**_TEXT, **self.text}, **self.fields
        )
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():  # none is zero, so that none can be left out
                parameter.add_(torch.randn_like(parameter) * 0.02)
        return (Llama4WithImages(model) if "Llama4" in self.model else model).eval()

    def inputs(
        self, sequence: int, start: int = 1, batch: int = 2, seed: int = 1
    ) -> dict[str, Any]:
        """Each text has an image from position `start` on."""
        torch.manual_seed(seed)
        ids = torch.randint(20, VOCABULARY, (batch, sequence))
        ids[:, start : start + FEATURES] = IMAGE
        if self.patch is None:
            return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 16, 16)}
        inputs = {
            "input_ids": ids,
            "pixel_values": torch.randn(batch * 16, self.patch),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        }
        return inputs | ({"mm_token_type_ids": (ids == IMAGE).int()} if self.types else {})


class Llama4WithImages(torch.nn.Module):
    """What `Llama4ForConditionalGeneration.forward` of transformers 5.24 computes; its last
    statement reads a field that its text model does not return."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        model = self.model
        hidden = model.get_input_embeddings()(input_ids)
        image = model.get_image_features(pixel_values=pixel_values, return_dict=True)
        features = image.last_hidden_state.flatten(0, 1)
        features = model.multi_modal_projector(features)
        mask = model.get_placeholder_mask(input_ids, inputs_embeds=hidden, image_features=features)
        hidden = hidden.masked_scatter(mask, features)
        logits: torch.Tensor = model.language_model(inputs_embeds=hidden, use_cache=False).logits
        return logits


IMAGE_FAMILIES: dict[str, ImageFamily] = {
    "aria": ImageFamily(
        "AriaForConditionalGeneration",
        "AriaConfig",
        {"model_type": "idefics3_vision", **_LAYERS, "intermediate_size": 48},
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        {"image_token_index": IMAGE, "projector_patch_to_query_dict": {16: FEATURES}},
    ),
    "llama4": ImageFamily(
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            **_LAYERS,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        {
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "attention_chunk_size": 64,
        },
        {"image_token_index": IMAGE},
    ),
    "qwen3_vl_moe": ImageFamily(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            **_VISION,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        {**_EXPERTS, "head_dim": 16, **_rope(4, 2, 2)},
        _TOKENS,
        patch=96,
    ),
    "qwen3_5_moe": ImageFamily(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {**_VISION, "out_hidden_size": 32, "num_position_embeddings": 16},
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "head_dim": 16,
            "layer_types": ["full_attention"],
            **_rope(1, 1, 0, partial_rotary_factor=0.25),
        },
        _TOKENS,
        patch=96,
    ),
    "glm4v_moe": ImageFamily(
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        {**_VISION, "image_size": 16, "out_hidden_size": 32},
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 0,
            "head_dim": 16,
            **_rope(2, 1, 1, partial_rotary_factor=0.5),
        },
        _TOKENS,
        patch=96,
    ),
    "ernie4_5_vl_moe": ImageFamily(
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VLMoeConfig",
        _VISION,
        {
            "moe_intermediate_size": [16, 16],
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["sparse"],
            **_rope(1, 1, 2),
        },
        _TOKENS,
        patch=48,
    ),
    "minimax_m3_vl": ImageFamily(
        "MiniMaxM3SparseForConditionalGeneration",
        "MiniMaxM3VLConfig",
        {**_LAYERS, "hidden_size": 48, "intermediate_size": 48},
        {
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "rotary_dim": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "mlp_layer_types": ["sparse"],
        },
        {"image_token_index": IMAGE, "video_token_index": VIDEO, "projector_hidden_size": 32},
        patch=96,
        types=False,
    ),
}
