"""Training schemes and trainable layers for mixture-of-experts models."""

from __future__ import annotations

from moec.train.distillation import StagedDistillation
from moec.train.ewa import EWA, ConstantRate, LinearRate

__all__ = ["EWA", "ConstantRate", "LinearRate", "StagedDistillation"]
