"""The sizes of a model's layers, without weights.

D model width, H hidden width of an expert, E experts, k experts a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moec.errors import SetupError
from moec.plan.inputs.files import Natural, Positive, Record, read_preset_or_file

BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "f64": 8.0, "fp8": 1.0}
BYTES |= {"int8": 1.0, "int4": 0.5, "int3": 0.375, "int2": 0.25}


class Layers(Record, frozen=True, kw_only=True):
    """`repeat` equal layers. `attention` is a number of parameters, `kv_values` the number of
    values that a token adds to the cache, `value_width` that of a head's values where it is not the
    `head_width` of its keys, `latent` the width of compressed keys and values in the cache
    (kv_lora_rank; 0 without compression), `dense_hidden` the width of the feed-forward network that
    all tokens pass (a dense one, shared experts, a residual MLP), `hidden` the width of an expert,
    `k_groups` of how many of the `groups` of experts a token's are, and `matrices` 3 with a gate or
    2 without."""

    repeat: Positive = 1
    attention: Natural = 0
    heads: Positive = 1
    head_width: Natural = 0
    kv_heads: Positive = 1
    kv_values: Natural = 0
    value_width: Natural = 0
    latent: Natural = 0
    dense_hidden: Natural = 0
    experts: Natural = 0
    zero_experts: Natural = 0
    k: Natural = 0
    groups: Positive = 1
    k_groups: Positive = 1
    hidden: Natural = 0
    matrices: Positive = 3

    def __post_init__(self) -> None:
        if self.experts and not 1 <= self.k <= self.experts + self.zero_experts:
            raise ValueError(f"{self.k} of {self.experts} experts per token is not possible")
        within = self.experts // self.groups * self.k_groups
        if self.k_groups > self.groups or (self.experts and self.k > within + self.zero_experts):
            raise ValueError(
                f"{self.k} of {self.experts} experts in {self.k_groups} of {self.groups} groups is "
                "not possible"
            )

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of a head's keys and values."""
        return self.head_width, self.value_width or self.head_width

    def pair_flop(self, decode: bool) -> int:
        """FLOPs of the attention of one token to another: scores and the sum of values, all heads.

        Compressed keys and values (MLA) are expanded for prompts. In decoding, W^UK is absorbed
        into the queries and W^UV into the output, so that heads work on the cache itself, of
        latent + rope values (DeepSeek-V2, arXiv 2405.04434, equations 10, 11 and 18).
        """
        key, value = self.widths
        if self.latent and decode:
            key, value = self.kv_values, self.latent
        return 2 * self.heads * (key + value)


class Model(Record, frozen=True, kw_only=True):
    name: str
    width: Positive
    weights: str
    vocabulary: Natural = 0
    layers: tuple[Layers, ...]

    def __post_init__(self) -> None:
        if self.weights not in BYTES:
            raise ValueError(f"weights is {self.weights}, not one of {', '.join(BYTES)}")

    @property
    def each_layer(self) -> tuple[Layers, ...]:
        """One entry per layer."""
        return tuple(group for group in self.layers for _ in range(group.repeat))

    @property
    def bytes_per_weight(self) -> float:
        return BYTES[self.weights]

    def expert_parameters(self, layer: Layers) -> int:
        """The number of parameters of one expert."""
        return layer.matrices * self.width * layer.hidden

    def dense_parameters(self, layer: Layers) -> int:
        """The number of parameters in a layer that every token uses."""
        router = self.width * (layer.experts + layer.zero_experts)
        return layer.attention + layer.matrices * self.width * layer.dense_hidden + router

    @property
    def parameters(self) -> int:
        total = 2 * self.vocabulary * self.width
        for layer in self.each_layer:
            total += self.dense_parameters(layer) + layer.experts * self.expert_parameters(layer)
        return total


def read_model(source: str) -> Model:
    """A preset by name, a YAML description, or a folder or file with a Hugging Face config.json.

    Raises UsageError.
    """
    path = Path(source)
    config = path / "config.json" if path.is_dir() else path
    if config.name.endswith("config.json") and config.is_file():
        try:
            content = json.loads(config.read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise SetupError(f"{config}: {error}") from None
        return of_config(content, str(config))
    return read_preset_or_file(source, Model, "models")


def of_config(config: Mapping[str, Any], source: str) -> Model:
    """The sizes in a Hugging Face config. Raises UsageError where one is missing."""
    config = config.get("text_config", config)

    def first(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return int(config[name])
        if default is None:
            raise SetupError(
                f"{source} has none of {', '.join(names)}: write a YAML description instead"
            )
        return default

    width = first("hidden_size", "d_model", "n_embd")
    layers = first("num_hidden_layers", "num_layers", "n_layer")
    experts = first("num_local_experts", "n_routed_experts", "num_experts", default=0)
    dense = first("intermediate_size", "d_ff", default=0)
    hidden = first("moe_intermediate_size", "expert_ffn_hidden_size", default=dense)
    shared = first("shared_expert_intermediate_size", default=0)
    shared += hidden * first("n_shared_experts", default=0)
    sparse = {
        "k": first("num_experts_per_tok", "moe_topk", "top_k", default=1),
        "experts": experts,
        "zero_experts": first("zero_expert_num", default=0),
        "hidden": hidden,
        "groups": first("n_group", default=1),
        "k_groups": first("topk_group", default=first("n_group", default=1)),
        "dense_hidden": shared,
    }
    skipped = set(config.get("mlp_only_layers") or ())
    skipped |= set(range(first("first_k_dense_replace", default=0)))
    step = first("decoder_sparse_step", "moe_layer_freq", default=1)
    same = _attention(first, width)
    each = tuple(
        Layers(**same, **sparse)
        if experts and index not in skipped and (index + 1) % step == 0
        else Layers(**same, dense_hidden=dense)
        for index in range(layers)
    )
    dtype = str(config.get("torch_dtype", config.get("dtype", "bfloat16")))
    names = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
    weights = "fp8" if "fp8" in str(config.get("quantization_config", "")) else names.get(dtype)
    return Model(
        name=str(config.get("model_type", source)),
        width=width,
        weights=weights or "bf16",
        vocabulary=first("vocab_size", default=0),
        layers=each,
    )


def _attention(first: Callable[..., int], width: int) -> dict[str, int]:
    """The sizes of the attention in a config, whose numbers `first` reads."""
    heads = first("num_attention_heads", "num_heads", "n_head")
    kv_heads = first("num_key_value_heads", default=heads)
    head = first("head_dim", default=width // heads)
    attention = 2 * width * heads * head + 2 * width * kv_heads * head
    values, v = 2 * kv_heads * head, 0
    if rank := first("kv_lora_rank", default=0):
        rope, nope, v = first("qk_rope_head_dim"), first("qk_nope_head_dim"), first("v_head_dim")
        q = first("q_lora_rank", default=0)
        query = q * (width + heads * (nope + rope)) if q else width * heads * (nope + rope)
        attention = query + width * (rank + rope) + rank * heads * (nope + v) + heads * v * width
        values, kv_heads, head = rank + rope, 1, nope + rope
    return {
        "attention": attention, "heads": heads, "head_width": head, "kv_heads": kv_heads,
        "value_width": v, "latent": rank, "kv_values": values,
    }  # fmt: skip
