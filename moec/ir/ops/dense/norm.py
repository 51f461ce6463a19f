"""nn.rms_norm: root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import layer_norm

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


KINDS = ("rms", "layer")


def _infer_add_norm(op: Op) -> tuple[TensorType, ...]:
    require(op, len(op.inputs) >= 2, "needs x and a residual")
    x, residual, *weights = op.inputs
    kind = op.attrs.get("kind")
    require(op, kind in KINDS, f"kind is not one of {KINDS}")
    require(op, len(x.shape) >= 1 and residual.type == x.type, f"{x} and {residual}")
    most = 1 if kind == "rms" else 2
    require(op, len(weights) <= most, f"{len(weights)} weights; a {kind} norm has at most {most}")
    for weight in weights:
        require(op, weight.shape == x.shape[-1:], f"{weight} is not for {x}")
    return (x.type, x.type)


@defop("nn.add_norm", _infer_add_norm, "x, residual, weight?, bias?", tokenwise=True)
def add_norm(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[.., D], residual[.., D], weight[D]?, bias[D]? -> total[.., D], y[.., D].

    total = x * `scale` + residual (`scale` defaults to 1). The product and the sum are rounded to
    x's dtype. y is nn.rms_norm of total (`kind` "rms", with the attributes `epsilon` and
    `round_first` of that op) or its layer_norm (`kind` "layer").
    """
    x, residual, *weights = tensors
    total = (x if attrs.get("scale") is None else x * attrs["scale"]) + residual
    if attrs["kind"] == "rms":
        return total, rms_normalise(total, weights, attrs)
    weight, bias = [*weights, None, None][:2]
    return total, layer_norm(total, total.shape[-1:], weight, bias, attrs["epsilon"])
