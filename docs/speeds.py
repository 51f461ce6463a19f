"""Draws the speeds of docs/systems.md as bars, docs/images/systems.svg; `python -m docs.systems`
writes it.

A bar is how many times as fast as the fastest of eager and Inductor a layer of a system is. The
axis is logarithmic: twice as fast is the same length everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parent / "images" / "systems.svg"
MARGIN, LINE, NAMES, PER_DOUBLING, NUMBERS = 14, 20, 310, 100, 60
TITLE = "Times as fast as the fastest of eager and Inductor, a layer of each system"
AXIS = "time of the fastest other / time of moec (logarithmic)"
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
    marks = _marks(bars)
    names, first = MARGIN + NAMES, MARGIN + LINE + 8
    left = names - round(_at(marks[0]))  # of ratio 1
    width = left + round(_at(marks[-1])) + NUMBERS + MARGIN
    bottom = first + len(bars) * LINE
    height = bottom + 2 * LINE + MARGIN
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" role="img">'
    )
    yield f"<title>{TITLE}</title>"
    yield f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
    yield _text(width / 2, MARGIN + 14, TITLE, "middle", ' font-weight="bold" font-size="14"')
    for mark in marks:
        x = left + round(_at(mark))
        yield f'<path d="M{x} {first} V{bottom}" stroke="{FAINT}"/>'
        yield _text(x, bottom + 15, f"{mark:g}", "middle")
    yield _text((names + left + _at(marks[-1])) / 2, bottom + 15 + LINE, AXIS, "middle")
    for number, bar in enumerate(bars):
        top = first + number * LINE
        yield _text(names - 8, top + 14, bar.name, "end")
        if bar.ratio is None:
            yield _text(left + 6, top + 14, "not measured", "start")
            continue
        length = round(abs(_at(bar.ratio)), 1)
        start = left if bar.ratio >= 1 else left - length
        colour = FASTER if bar.ratio >= 1 else SLOWER
        yield f'<rect x="{start}" y="{top + 4}" width="{length}" height="12" fill="{colour}"/>'
        yield _text(left + max(_at(bar.ratio), 0) + 6, top + 14, f"{bar.ratio:.2f}", "start")
    yield "</svg>"


def _marks(bars: Sequence[Bar]) -> list[float]:
    """Powers of two, 1 and 2 among them, that all bars are between."""
    powers = [0.0, 1.0, *(math.log2(bar.ratio) for bar in bars if bar.ratio is not None)]
    return [2.0**power for power in range(math.floor(min(powers)), math.ceil(max(powers)) + 1)]


def _at(ratio: float) -> float:
    """The distance of a ratio from 1, in pixels; a ratio below 1 is to the left."""
    return PER_DOUBLING * math.log2(ratio)


def _text(x: float, y: int, text: str, anchor: str, style: str = "") -> str:
    about = f'x="{x:.1f}" y="{y}" fill="{INK}" text-anchor="{anchor}"{style}'
    return f"<text {about}>{escape(text)}</text>"
