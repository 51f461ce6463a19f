"""A table of numbers as a heat map, in SVG or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError

_STOPS = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107), (165, 15, 21))
"""Colors of 0, 1, 2, 3 and 4 times the mean: from white over blue to red."""
_LEFT, _TOP, _WIDTH = 90, 64, 900


def heat_map(
    rows: Sequence[NDArray[np.float64]], title: str, row_name: str, column_name: str
) -> str:
    """An SVG with a row of cells for each array. The color of a cell is its multiple of the row's
    mean: white 0, light blue 1, dark blue 3, red 4 and more."""
    columns = max((len(row) for row in rows), default=1)
    pitch = max(3.0, min(24.0, _WIDTH / columns))
    height = max(8.0, min(24.0, 640 / max(1, len(rows))))
    width = _LEFT + columns * pitch + 30
    total = _TOP + len(rows) * height + 70
    marks = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {total:.0f}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width:.0f}" height="{total:.0f}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="26" font-size="17" fill="#222">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="{_TOP - 10}" fill="#555">{escape(column_name)} →</text>',
    ]
    step = -(-len(rows) // 40) if rows else 1
    for index, row in enumerate(rows):
        y = _TOP + index * height
        if index % step == 0:
            marks.append(
                f'<text x="{_LEFT - 8}" y="{y + height / 2 + 4:.1f}" text-anchor="end" '
                f'fill="#555">{escape(row_name)} {index}</text>'
            )
        mean = float(row.mean()) if len(row) else 0.0
        for column, value in enumerate(row):
            ratio = float(value) / mean if mean > 0 else 0.0
            marks.append(
                f'<rect x="{_LEFT + column * pitch:.2f}" y="{y:.2f}" width="{pitch:.2f}" '
                f'height="{height:.2f}" fill="{_colour(ratio)}"><title>{escape(row_name)} {index}, '
                f"{escape(column_name)} {column}: {ratio:.2f} of the mean</title></rect>"
            )
    marks += _legend(_TOP + len(rows) * height + 24)
    return "\n".join([*marks, "</svg>"]) + "\n"


def _legend(y: float) -> list[str]:
    marks = []
    for index in range(5):
        x = _LEFT + index * 90
        word = f"{index} x mean" + (" or more" if index == 4 else "")
        marks.append(
            f'<rect x="{x}" y="{y:.0f}" width="16" height="16" fill="{_colour(index)}" '
            f'stroke="#ccc"/><text x="{x + 22}" y="{y + 13:.0f}" fill="#555">{word}</text>'
        )
    return marks


def _colour(ratio: float) -> str:
    position = min(max(ratio, 0.0), len(_STOPS) - 1.001)
    index = int(position)
    part = position - index
    mixed = (
        round(a + (b - a) * part) for a, b in zip(_STOPS[index], _STOPS[index + 1], strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def check_picture_name(path: Path) -> None:
    """Raises UsageError for a name that ends in neither .svg nor .html."""
    if path.suffix not in (".svg", ".html"):
        raise UsageError(f"{path}: a picture ends in .svg or .html")


def save_picture(svg: str, path: Path, title: str) -> None:
    """Write the picture to `path`. Raises UsageError unless its name ends in .svg or .html."""
    check_picture_name(path)
    if path.suffix == ".svg":
        path.write_text(svg)
    else:
        head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        path.write_text(f'{head}<body style="margin:2em">\n{svg}</body>\n')
