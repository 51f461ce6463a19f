"""Paths of modules that differ in a layer's index, written as one."""

from __future__ import annotations

import re
from collections.abc import Sequence


def collapse_layer_indices(names: Sequence[str]) -> str:
    """Several names that differ in one number, as one text: model.layers.{0..23}.mlp."""
    if len(names) == 1:
        return names[0]
    split = [re.split(r"(?<![^.])(\d+)(?![^.])", name) for name in names]
    width = len(split[0])
    if all(len(parts) == width for parts in split):
        differing = [i for i in range(width) if len({parts[i] for parts in split}) > 1]
        if len(differing) == 1 and differing[0] % 2 == 1:
            at = differing[0]
            parts = list(split[0])
            parts[at] = "{" + spans([int(p[at]) for p in split]) + "}"
            return "".join(parts)
    return f"{names[0]} and {len(names) - 1} more"


def spans(numbers: Sequence[int]) -> str:
    """0..3,5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
