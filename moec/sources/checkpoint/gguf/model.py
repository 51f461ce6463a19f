"""What a GGUF file says of its model: a configuration of transformers, and names of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moec.errors import CaptureError
from moec.files.gguf import GgufHeader
from moec.sources.checkpoint.gguf import rotary
from moec.sources.checkpoint.gguf.architectures import (
    INNER,
    INTEGERS,
    OTHERS,
    OUTER,
    REALS,
    SAY_NOTHING,
    Architecture,
    architecture_of,
)
from moec.sources.checkpoint.gguf.fields import flag, integer, real

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_FROM_ZERO = (
    *("expert_shared_count", "expert_group_count", "expert_group_used_count"),
    *("leading_dense_block_count", "attention.sliding_window"),
)
_LATENT = ("attention.key_length_mla", "attention.value_length_mla")


def configuration(header: GgufHeader) -> dict[str, Any]:
    """The configuration, with `model_type`. Raises CaptureError for an architecture or a field
    that moec does not map."""
    fields = header.fields
    name, architecture = architecture_of(fields)
    latent = "attention.kv_lora_rank" in architecture.integers
    _check_fields(fields, name, architecture, (*rotary.NAMES, *(_LATENT if latent else ())))
    config: dict[str, Any] = {"model_type": architecture.model_type, **architecture.fixed}
    for part, key in (INTEGERS | dict(architecture.integers)).items():
        if f"{name}.{part}" in fields:
            value = integer(fields, f"{name}.{part}", 0, least=0 if part in _FROM_ZERO else 1)
            config |= {key: value} if value or key not in config else {}
    for part, key in (REALS | dict(architecture.reals)).items():
        if f"{name}.{part}" in fields:
            config[key] = real(fields, f"{name}.{part}", 1.0)
    for part, key in architecture.flags.items():
        config[key] = flag(fields, f"{name}.{part}", config[key])
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if key not in config:
            raise CaptureError(f"the file says no {key} of {name}")
    _check_counts(header, name, architecture, config)
    config["num_hidden_layers"] -= integer(fields, f"{name}.nextn_predict_layers", 0)
    if latent:
        _set_latent(fields, name, config)
    _set_rotary(fields, name, config)
    if "attention.scale" in architecture.reals:
        width = config["hidden_size"] // config["num_attention_heads"]
        config.setdefault("attention_multiplier", width**-0.5)
    if "token_embd.weight" in header.tensors:
        config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config |= {key: tensor in header.tensors for key, tensor in architecture.present.items()}
    for token in ("bos", "eos"):
        config[f"{token}_token_id"] = fields.get(f"tokenizer.ggml.{token}_token_id")
    return config


def _check_fields(
    fields: Mapping[str, Any], name: str, architecture: Architecture, others: tuple[str, ...]
) -> None:
    """Raises CaptureError for a field of the architecture that is not mapped, and changes the
    model or may."""
    maps = (INTEGERS, REALS, architecture.integers, architecture.reals, architecture.flags)
    mapped = {*others, *SAY_NOTHING}.union(*maps)
    for field, value in fields.items():
        part = field.removeprefix(f"{name}.")
        if part in SAY_NOTHING:
            integer(fields, field, 0)
        if part == field or part in mapped:
            continue
        if value not in architecture.allowed.get(part, OTHERS.get(part, ())):
            raise CaptureError(f"{field} is {value!r:.40}, which moec does not map")


def _check_counts(
    header: GgufHeader, name: str, architecture: Architecture, config: Mapping[str, Any]
) -> None:
    """Raises CaptureError where the file has another number of blocks, as transformers would first
    make the layers, billions perhaps; or where a token needs more experts than there are."""
    blocks = {match[1] for tensor in header.tensors if (match := LAYER.match(tensor))}
    count = config["num_hidden_layers"]
    layers = count - integer(header.fields, f"{name}.nextn_predict_layers", 0)
    if layers < 1 or not layers <= len(blocks) <= count:
        raise CaptureError(f"block_count is {count:,}, and the file holds {len(blocks):,} blocks")
    if "expert_count" in architecture.integers:
        experts, used = (
            config.get(architecture.integers[f"expert_{part}"], 0)
            for part in ("count", "used_count")
        )
        if not 1 <= used <= experts:
            raise CaptureError(f"{name}.expert_used_count has to be 1 to {experts}")


def _set_latent(fields: Mapping[str, Any], name: str, config: dict[str, Any]) -> None:
    """Sizes of the heads of attention with latent keys. Newer files give those of the attention
    that llama.cpp computes under the common names, and the model's under names of their own."""
    sizes = [
        integer(fields, f"{name}.attention.{side}_length_mla", 0)
        or integer(fields, f"{name}.attention.{side}_length", 0, least=1)
        for side in ("key", "value")
    ]
    rotated = integer(fields, f"{name}.rope.dimension_count", 0, least=1)
    config.pop("head_dim", None)
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": sizes[0] - rotated,
        "v_head_dim": sizes[1],
    }
    if rotated >= sizes[0]:
        raise CaptureError(f"{name}.rope.dimension_count is {rotated} of {sizes[0]}")
    if config["model_type"] == "deepseek_v2":
        limited = config["n_group"] > 1
        config["topk_method"] = "group_limited_greedy" if limited else "greedy"


def _set_rotary(fields: Mapping[str, Any], name: str, config: dict[str, Any]) -> None:
    latent = "qk_rope_head_dim" in config
    parameters = rotary.rope_parameters(fields, name, latent)
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rotated = integer(fields, f"{name}.rope.dimension_count", width, least=1)
    if config["model_type"] == "glm4_moe":
        parameters["partial_rotary_factor"] = rotated / width
    elif rotated != width and not latent:
        raise CaptureError(f"{name}.rope.dimension_count is {rotated}, and heads have {width}")
    if config["model_type"] == "gpt_oss" and parameters["rope_type"] == "yarn":
        parameters["truncate"] = False  # as in all configurations of the model
    config["rope_parameters"] = parameters


def model_name(architecture: Architecture, name: str) -> str:
    """transformers' name of a tensor. Unknown names stay, so that nothing reads them."""
    match = LAYER.fullmatch(name)
    names, part = (INNER | dict(architecture.names), match[2]) if match else (OUTER, name)
    stem, _, ending = part.rpartition(".")
    if part in names:
        renamed = names[part]
    elif stem in names and ending in ("weight", "bias"):
        renamed = f"{names[stem]}.{ending}"
    else:
        return name
    return f"model.layers.{match[1]}.{renamed}" if match else renamed
