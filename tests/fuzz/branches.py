"""Branches of layers on sizes: conditions, and what depends on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import indent

CONDITIONS = (
    "x.shape[0] == 1",
    "x.shape[0] > 1",
    "x.shape[1] == 1",
    "x.shape[1] > 1",
    "x.size(1) <= 7",
    "x.shape[1] > 6",
    "x.shape[1] >= 32",
    "x.shape[0] * x.shape[1] < 30",
    "x.shape[0] * x.shape[1] >= 41",
    "x.shape[0] == 1 and x.shape[1] == 1",
    "len(x) == 1 or x.shape[1] > 30",
)
CONDITIONS_OF_TOKENS = ("tokens == 1", "tokens <= 12", "tokens > 20", "tokens > 100")
"""These need `tokens`, which `x` before it is flat does not have."""


@dataclass(frozen=True)
class Part:
    """Lines after the part `after` of a layer, if the condition holds, and if it does not."""

    after: str
    lines: str
    others: str = ""


PARTS: Mapping[str, Part] = {
    "rows": Part("rows", "flat = flat.relu()"),
    "centred rows": Part("rows", "flat = flat - flat.mean(0, keepdim=True)"),
    "logits": Part("logits", "logits = logits / 2"),
    "either logits": Part("logits", "logits = logits * 3", "logits = logits.tanh()"),
    "even": Part("choice", "weights = torch.ones_like(weights) / weights.shape[1]"),
    "scale": Part("out", "out = out * 0.5"),
    "relu": Part("out", "out = out.relu()", "out = out * 2"),
    "residual": Part("out", "out = out + flat"),
    "centred": Part("out", "out = out - out.mean(0, keepdim=True)"),
}
"""By name. Beside them "second input" is its lines, "shared experts" those, and "dispatch"
another dispatch where the condition holds."""

SECOND, SHARED, DISPATCH = "second input", "shared experts", "dispatch"


def branch(condition: str, lines: str, others: str = "") -> str:
    """An if statement; "" without lines."""
    if not lines:
        return ""
    text = f"if {condition}:\n{indent(lines, '    ')}"
    return f"{text}\nelse:\n{indent(others, '    ')}" if others else text
