"""Specs of norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    """One normalisation; dtypes of x (and residual and sum), weight, bias and out.

    kind rms: y = x / sqrt(mean(x^2) + eps). kind layer: y = (x - mean) / sqrt(variance + eps).
    out = y * weight + bias, in float32 and rounded once; `plus_one` multiplies with 1 + weight
    (Gemma); `round_first` rounds y to x's dtype before the product (Llama and similar models).
    With a residual, x * scale (Granite), rounded to x's dtype, is added to it; mean and variance
    are those of the rounded sum.
    """

    kind: Literal["rms", "layer"]
    width: int
    eps: float
    x: str
    out: str
    weight: str | None
    bias: str | None = None
    residual: bool = False
    scale: float | None = None
    plus_one: bool = False
    round_first: bool = False
