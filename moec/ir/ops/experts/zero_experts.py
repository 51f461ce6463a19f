"""moe.zero_experts: the results of experts without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.ir.graph import DType, Op, TensorType, Value
from moec.ir.opdef import Runner, defop, inputs_of, integer, require, tensors_of

KINDS = ("zero", "copy", "constant")
INPUTS = "x, experts, weights?weighted, mix?mixed, constants?kinds:constant, addend?added"


@dataclass(frozen=True)
class ZeroExperts:
    """The inputs of moe.zero_experts by name, and the meaning of ids.

    `kinds` holds, for each id from `first` on, "copy", "constant" (the next row of `constants`) or
    "zero". Ids below `first` have networks; ids beyond `kinds` are "zero" too.
    """

    x: Value
    experts: Value
    weights: Value | None
    mix: Value | None
    constants: Value | None
    addend: Value | None
    first: int
    kinds: tuple[str, ...]

    @staticmethod
    def of(op: Op) -> ZeroExperts:
        kinds = cast("tuple[str, ...]", op.attrs["kinds"])
        return ZeroExperts(**inputs_of(op), first=integer(op, "first"), kinds=kinds)


def _infer(op: Op) -> tuple[TensorType, ...]:
    parts = ZeroExperts.of(op)
    x, experts = parts.x, parts.experts
    require(op, len(x.shape) == 2 and len(experts.shape) == 2, f"{x} by {experts}")
    require(op, x.shape[0] == experts.shape[0], f"{x.shape[0]} tokens, {experts.shape[0]} choices")
    require(op, parts.first >= 0, f"ids begin at {parts.first}")
    require(op, set(parts.kinds) <= set(KINDS), f"kinds are {parts.kinds}, not among {KINDS}")
    if parts.weights is not None:
        require(op, parts.weights.shape == experts.shape, f"{parts.weights} for {experts}")
    count, width = parts.kinds.count("constant"), x.shape[1]
    if parts.constants is not None:
        require(
            op, parts.constants.shape == (count, width), f"{parts.constants} for {count} of {x}"
        )
    if parts.mix is not None:
        require(op, parts.mix.shape == (count, 2, width), f"{parts.mix} for {count} of {x}")
    if parts.addend is not None:
        require(op, parts.addend.shape == x.shape, f"{parts.addend} is added to {x}")
    dtype = cast(DType, op.attrs["dtype"]).name
    return (TensorType(dtype, x.shape),)


@defop("moe.zero_experts", _infer, INPUTS, tokenwise=True)
def zero_experts(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x[T, D], experts[T, k], weights[T, k]?, mix[C, 2, D]?, constants[C, D]?, addend[T, D]?
    -> z[T, D].

    z[t] = sum over s of weights[t, s] * E(x[t]), where E is that of experts[t, s]: a copy gives
    x; constant c gives a * x + b * constants[c] with (a, b) = softmax(mix[c] @ x), or
    constants[c] alone without `mix`; any other expert gives 0, whatever x holds. The addend is
    added last. In float32. Attributes: `first` and `kinds` (see ZeroExperts), `weighted`,
    `mixed`, `added`, `dtype` of z.
    (MoE++, arXiv 2410.07348, equations 3 to 5.)
    """
    inputs = tensors_of("moe.zero_experts", op, tensors, attrs)
    x, experts = inputs.pop("x"), inputs.pop("experts")
    weights, mix, constants, addend = (t if t is None else t.float() for t in inputs.values())
    weights = torch.ones(experts.shape) if weights is None else weights
    constants = torch.empty(0) if constants is None else constants
    wide = x.float()
    total, copy_weight, c = torch.zeros(wide.shape), torch.zeros(len(wide), 1), 0
    for number, kind in enumerate(attrs["kinds"], attrs["first"]):
        part = torch.where(experts == number, weights, 0.0).sum(-1, keepdim=True)
        if kind == "copy":
            copy_weight = copy_weight + part
        elif kind == "constant":
            pulled = part
            if mix is not None:
                alpha = (wide @ mix[c].T).softmax(-1)
                copy_weight = copy_weight + torch.where(part != 0, part * alpha[:, :1], 0.0)
                pulled = part * alpha[:, 1:]
            total = total + torch.where(part != 0, pulled * constants[c], 0.0)
            c += 1
    total = total + torch.where(copy_weight != 0, copy_weight * wide, 0.0)
    if addend is not None:
        total = total + addend
    return total.to(attrs["dtype"])
