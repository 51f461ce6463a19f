"""nn.rotary: rotary position embedding (arXiv 2104.09864) of queries or keys as one op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.dtypes import FLOATS
from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import Runner, defop, require
from moec.ir.sizes.dims import broadcasts

PAIRINGS = ("halves", "neighbours")


def _infer_rotary(op: Op) -> tuple[TensorType, ...]:
    require(op, len(op.inputs) == 3, "needs x, cos and sin")
    x, cos, sin = op.inputs
    require_rotary(op, x, cos, sin)
    for name in ("pairs", "gives"):
        require(op, op.attrs.get(name, "halves") in PAIRINGS, f"{name} is not one of {PAIRINGS}")
    return (x.type,)


def require_rotary(op: Op, x: Value, cos: Value, sin: Value) -> None:
    """Raises IRError where cos and sin do not match the pairs of features of x."""
    width = x.shape[-1] if x.shape else 0
    require(op, isinstance(width, int) and width % 2 == 0, f"{x} has no even number of features")
    assert isinstance(width, int)
    for value in (cos, sin):
        require(op, value.dtype in FLOATS and x.dtype in FLOATS, f"{value} is not of floats")
        fits = broadcasts(value.shape[:-1], x.shape[:-1]) and len(value.shape) == len(x.shape)
        require(op, fits and value.shape[-1] in (width, width // 2), f"{value} is not for {x}")
    require(op, cos.shape[-1] == sin.shape[-1], f"{cos} and {sin}")


@defop("nn.rotary", _infer_rotary, "x, cos, sin", tokenwise=True)
def rotary(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[.., D], cos, sin [.., D or D/2] -> x with each pair (a, b) rotated by its angle.

    a' = a * cos - b * sin, b' = b * cos + a * sin, in float32 (float64 where x is), rounded to
    x's dtype at the end. `pairs` is the layout of pairs in x: "halves" (a in the first half of the
    features, b in the second) or "neighbours" (2i and 2i+1); `gives` is that of the result. Both
    default to "halves". cos and sin broadcast over all axes but the last; where they have D
    features, the first half is for a' and the second for b'.
    """
    x, cos, sin = tensors
    return rotate_pairs(x, cos, sin, **attrs)


def rotate_pairs(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: str = "halves",
    gives: str = "halves",
) -> torch.Tensor:
    """The meaning of nn.rotary."""
    full = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = x.shape[-1] // 2
    if pairs == "halves":
        a, b = x[..., :half].to(full), x[..., half:].to(full)
    else:
        a, b = x[..., 0::2].to(full), x[..., 1::2].to(full)
    cos, sin = cos.to(full), sin.to(full)
    first = a * cos[..., :half] - b * sin[..., :half]
    second = b * cos[..., -half:] + a * sin[..., -half:]
    if gives == "halves":
        return torch.cat([first, second], -1).to(x.dtype)
    return torch.stack([first, second], -1).flatten(-2).to(x.dtype)
