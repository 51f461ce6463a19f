"""What an approximate pass saved and what it cost, as data: the numbers behind the report.

Distances are those of a changed model from the original one, both in float32, so that they tell
of meaning and not of rounding. Bytes are those of stored weights, FLOPs those of the products of
matrices, per token.
"""

from __future__ import annotations

from dataclasses import dataclass

METRICS = {
    "kl": "KL divergence of the next token from the original model's, in nats a token",
    "perplexity": "perplexity of the calibration text",
    "error": "error of the outputs, relative to their norm",
    "changed": "share of tokens whose experts changed, over all layers",
}


@dataclass(frozen=True)
class Distance:
    """See METRICS; `kl` and `perplexity` are None where the model is no causal language model."""

    error: float
    changed: float
    kl: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class LayerDamage:
    """What a pass did to one layer. `says` is what it did, or why it was undone or declined.

    `error` is that of the layer's output where its inputs are the same as before the pass;
    `changed` that share of this layer alone; `after` is the distance of the whole model from
    the original with this layer and those above in this report changed. Undone layers save
    nothing, and hold what was measured before they were undone.
    """

    layer: str
    says: str
    undone: bool
    bytes_saved: int
    flops_saved: float
    error: float
    changed: float
    after: Distance


@dataclass(frozen=True)
class Damage:
    """What one approximate pass did. `tokens` is how many of calibration data it was measured on.

    `after` is the distance from the model as it was before any approximate pass; bytes and
    FLOPs before are those before this pass, `original` what that model itself measures.
    """

    name: str
    tokens: int
    budget: str
    bytes_before: int
    bytes_after: int
    flops_before: float
    flops_after: float
    original: Distance
    after: Distance
    layers: tuple[LayerDamage, ...] = ()

    @property
    def applied(self) -> bool:
        return any(not layer.undone for layer in self.layers)
