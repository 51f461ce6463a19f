"""Rotary embeddings of a GGUF file: the type and numbers of their scaling, and factors of the
frequencies, which llama 3.1 and later have as a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moec.errors import CaptureError
from moec.sources.checkpoint.gguf.fields import integer, real
from moec.sources.checkpoint.gguf.weights import GgufWeights, stored_weights

FACTORS = "rope_freqs.weight"
LONG = ("rope_factors_long.weight", "rope_factors_short.weight")
NAMES = (
    *("rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    "rope.scaling.yarn_log_multiplier",
)
"""The fields that this file reads."""


def rope_parameters(fields: Mapping[str, Any], name: str, latent: bool) -> dict[str, Any]:
    """transformers' rope_parameters of an architecture, without its partial_rotary_factor.

    With `latent`, attention multiplies its scale too. Raises CaptureError, naming the field, for a
    type of scaling that is not mapped.
    """
    prefix = f"{name}.rope."
    # every type applies to a factor that stands without one in older files
    kind = fields.get(f"{prefix}scaling.type", "linear")
    old = real(fields, f"{prefix}scale_linear", 1.0)
    factor = real(fields, f"{prefix}scaling.factor", old)
    theta = real(fields, f"{prefix}freq_base", 10000.0)
    result: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if real(fields, f"{prefix}scaling.attn_factor", 1.0) != 1.0:
        raise CaptureError(f"{prefix}scaling.attn_factor is not 1, which moec does not map")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return result
    if kind == "linear":
        return result | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise CaptureError(f"{prefix}scaling.type is {kind!r:.40}; moec maps none, linear and yarn")
    if real(fields, f"{prefix}scaling.yarn_ext_factor", 1.0) != 1.0:
        raise CaptureError(f"{prefix}scaling.yarn_ext_factor is not 1, which moec does not map")
    length = integer(fields, f"{name}.context_length", 1, least=1)
    result |= {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": integer(
            fields, f"{prefix}scaling.original_context_length", length, least=1
        ),
        "beta_fast": real(fields, f"{prefix}scaling.yarn_beta_fast", 32.0),
        "beta_slow": real(fields, f"{prefix}scaling.yarn_beta_slow", 1.0),
    }
    if f"{prefix}scaling.yarn_attn_factor" in fields:
        result["attention_factor"] = real(fields, f"{prefix}scaling.yarn_attn_factor", 1.0)
    multiplier = f"{prefix}scaling.yarn_log_multiplier"
    if multiplier in fields and not latent:
        raise CaptureError(f"{multiplier} is not mapped for {name}")
    if multiplier in fields:
        scale = real(fields, multiplier, 0.1) / 0.1
        result |= {"mscale": scale, "mscale_all_dim": scale}
    return result


def frequency_factors(files: GgufWeights) -> Tensor | None:
    """The factors f32[dimensions / 2] by which frequencies are divided, if the file has them."""
    if FACTORS not in files.header.tensors:
        return None
    return stored_weights(files)[FACTORS].values().float()


def divide_frequencies(model: nn.Module, factors: Tensor) -> None:
    """Divides the frequencies of the model's rotary embeddings by factors [dimensions / 2].

    Raises CaptureError where it has others.
    """
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, Tensor):
            if frequencies.shape != factors.shape or not bool((factors > 0).all()):
                raise CaptureError(
                    f"{FACTORS} is {list(factors.shape)}, or not positive, and the model has "
                    f"{list(frequencies.shape)} frequencies"
                )
            frequencies.div_(factors)
