"""The savings and the loss of quality of an approximate pass, as data for the report.

Distances compare the changed model with the original one, both in float32, so that rounding does
not count. Bytes are those of stored weights; FLOPs are those of matrix products, per token.
"""

from __future__ import annotations

from dataclasses import dataclass

METRICS = {
    "kl": "KL divergence of the next token from the original model's, in nats per token",
    "perplexity": "perplexity of the calibration text",
    "error": "error of the outputs, relative to their norm",
    "changed": "share of tokens whose experts changed, over all layers",
}


@dataclass(frozen=True)
class Distance:
    """See METRICS; `kl` and `perplexity` are None if the model is no causal language model."""

    error: float
    changed: float
    kl: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class LayerDamage:
    """The effect of a pass on one layer. `says` describes it, or why it was undone or declined.

    `error` is the error of the layer's output given the inputs from before the pass; `changed` is
    the share of tokens whose experts changed in this layer; `after` is the distance of the model
    from the original with this layer, and the layers before it in the report, changed. A layer that
    was undone saves nothing; its measurements are those from before it was undone.
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
    """The effect of one approximate pass, measured on `tokens` tokens of calibration data.

    `after` is the distance from the model before any approximate pass, and `original` that model's
    own measurements; bytes and FLOPs "before" are those before this pass.
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


@dataclass(frozen=True)
class ChoiceLine:
    """The format of a product, or the experts and top-k of a layer, in words; the bytes that it
    saves, the damage that was predicted for it (of a layer: measured alone), and of a layer the
    part that the dropped experts had of its results. The notes of the report have the limits and
    the damage of all together."""

    name: str
    choice: str
    bytes_saved: int
    damage: float
    share: float | None = None


FEWEST = 32
"""An expert with fewer rows of calibration data is rounded to nearest."""


@dataclass(frozen=True)
class RoundingStats:
    """How well codes reproduce the stack called `weight`.

    Both errors are measured on the experts' products with their calibration rows, relative to the
    norm of the exact products: with weights rounded to nearest, and with the codes in use.
    """

    weight: str
    rows_per_expert: tuple[int, ...]
    nearest_error: float
    gptq_error: float
    experts: tuple[int, ...] = ()
    """Their numbers, if they are not all experts of a layer."""

    @property
    def undersampled(self) -> tuple[int, ...]:
        """Experts with fewer than FEWEST rows: their weights are rounded to nearest."""
        numbers = self.experts or range(len(self.rows_per_expert))
        each = zip(numbers, self.rows_per_expert, strict=True)
        return tuple(e for e, rows in each if rows < FEWEST)
