"""Numbers with units, rounded for people."""

from __future__ import annotations

import re
from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """1 layer, 2 layers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def count(number: float) -> str:
    """1.2 M for 1234567."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return (
                f"{number / size:.3g} {unit}"
                if number < 999 * size
                else f"{number / size:.0f} {unit}"
            )
    return str(int(number))


def size(number: float) -> str:
    """1.2 MB for 1234567 bytes."""
    for unit, unit_size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= unit_size:
            return f"{number / unit_size:.1f} {unit}"
    return f"{int(number)} bytes"


def seconds(number: float) -> str:
    return f"{number:.2f} s" if number < 9.995 else f"{number:.0f} s"


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
