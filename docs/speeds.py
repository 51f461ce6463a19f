"""Draws the speeds of docs/systems.md as bars, docs/images/systems.svg; `python -m docs.systems`
writes it.

A bar is how many times as fast as the better of eager and Inductor a layer of a system is. The axis
is logarithmic: twice as fast is the same length everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parent / "images" / "systems.svg"
MARGIN, LINE, NAMES, PER_DOUBLING, NUMBERS = 14, 20, 310, 100, 60
MARKS = (1, 2, 4, 8, 16)
INK, FAINT, FASTER, SLOWER = "#333333", "#c4c9d0", "#2a7f62", "#9b2d5e"


@dataclass(frozen=True)
class Bar:
    """A system with its ratio, None if it was not measured."""

    name: str
    ratio: float | None


def picture(bars: Sequence[Bar]) -> str:
    """The SVG."""
    return "\n".join(_svg(bars)) + "\n"


def _svg(bars: Sequence[Bar]) -> Iterator[str]:
    width = 2 * MARGIN + NAMES + round(_at(MARKS[-1])) + NUMBERS
    height = 2 * MARGIN + (len(bars) + 1) * LINE
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" role="img">'
    )
    yield "<title>Times as fast as the better of eager and Inductor, by system</title>"
    yield f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
    left, bottom = MARGIN + NAMES, MARGIN + len(bars) * LINE
    for mark in MARKS:
        x = left + round(_at(mark))
        yield f'<path d="M{x} {MARGIN} V{bottom}" stroke="{FAINT}"/>'
        yield _text(x, bottom + 15, f"{mark}x", "middle")
    for number, bar in enumerate(bars):
        top = MARGIN + number * LINE
        yield _text(left - 8, top + 14, bar.name, "end")
        if bar.ratio is None:
            yield _text(left + 6, top + 14, "not measured", "start")
            continue
        length = round(abs(_at(bar.ratio)), 1)
        start = left if bar.ratio >= 1 else left - length
        colour = FASTER if bar.ratio >= 1 else SLOWER
        yield f'<rect x="{start}" y="{top + 4}" width="{length}" height="12" fill="{colour}"/>'
        yield _text(left + max(_at(bar.ratio), 0) + 6, top + 14, f"{bar.ratio:.2f}", "start")
    yield "</svg>"


def _at(ratio: float) -> float:
    """The distance of a ratio from 1, in pixels; a ratio below 1 is to the left."""
    return PER_DOUBLING * math.log2(ratio)


def _text(x: float, y: int, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="{INK}" text-anchor="{anchor}">{escape(text)}</text>'
