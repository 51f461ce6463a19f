"""nn.rms_norm: root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Runner, defop, require


def _infer_rms_norm(op: Op) -> tuple[TensorType, ...]:
    x, *weight = op.inputs
    require(op, len(x.shape) >= 1 and len(weight) <= 1, "takes x[.., D] and weight[D]?")
    require(op, not weight or weight[0].shape == x.shape[-1:], f"{weight} is not for {x}")
    return (x.type,)


@defop("nn.rms_norm", _infer_rms_norm, "x, weight?", tokenwise=True)
def rms_norm(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[.., D], weight[D]? -> x / sqrt(mean(x^2) + epsilon) * weight, in float32, then cast.

    `round_first`: the normalised value is rounded to x's dtype before weight multiplies it.
    """
    return rms_normalise(tensors[0], tensors[1:], attrs)


def rms_normalise(
    x: torch.Tensor, weight: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> torch.Tensor:
    """As nn.rms_norm, with the attributes of that op."""
    full = x.float()
    full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + attrs["epsilon"])
    if attrs.get("round_first"):
        full = full.to(x.dtype)
    if weight:
        full = full * (weight[0] if attrs.get("round_first") else weight[0].float())
    return full.to(x.dtype)
