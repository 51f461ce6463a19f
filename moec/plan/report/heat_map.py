"""A table of numbers as a heat map, in PNG, SVG or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError

_STOPS = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107), (165, 15, 21))
"""Colors of 0, 1, 2, 3 and 4 times the mean: from white over blue to red."""
_UNUSED = (250, 214, 140)
"""The color of exactly 0, such as an expert that no token chose: amber."""
_LEFT, _TOP, _WIDTH = 90, 64, 900


@dataclass(frozen=True)
class Table:
    """A row of cells for each array; `notes[row][column]` is shown beside the number of a cell to
    which one points."""

    rows: Sequence[NDArray[np.float64]]
    title: str
    row_name: str
    column_name: str
    notes: Sequence[Sequence[str]] = ()


def heat_map(*tables: Table) -> str:
    """An SVG of tables, one below the other. The color of a cell is its multiple of the row's mean:
    amber 0, light blue 1, dark blue 3, red 4 and more."""
    drawn = [_drawn(table) for table in tables]
    width = max(width for width, _, _ in drawn)
    total = sum(height for _, height, _ in drawn)
    marks = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {total:.0f}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width:.0f}" height="{total:.0f}" fill="#fff"/>',
    ]
    top = 0.0
    for _, height, cells in drawn:
        marks += [f'<g transform="translate(0 {top:.0f})">', *cells, "</g>"]
        top += height
    return "\n".join([*marks, "</svg>"]) + "\n"


def _drawn(table: Table) -> tuple[float, float, list[str]]:
    """The width, the height and the elements of a table."""
    rows, row_name, column_name = table.rows, table.row_name, table.column_name
    columns = max((len(row) for row in rows), default=1)
    pitch = max(3.0, min(24.0, _WIDTH / columns))
    height = max(8.0, min(24.0, 640 / max(1, len(rows))))
    width = _LEFT + columns * pitch + 30
    total = _TOP + len(rows) * height + 70
    marks = [
        f'<text x="{_LEFT}" y="26" font-size="17" fill="#222">{escape(table.title)}</text>',
        f'<text x="{_LEFT}" y="{_TOP - 20}" fill="#555">{escape(column_name)} →</text>',
    ]
    distance = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * pitch >= 30 or n == 100)
    for column in range(0, columns, distance):
        x = _LEFT + (column + 0.5) * pitch
        marks.append(
            f'<text x="{x:.1f}" y="{_TOP - 5}" text-anchor="middle" font-size="10" fill="#555">'
            f"{column}</text>"
        )
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
            note = f"; {escape(table.notes[index][column])}" if table.notes else ""
            marks.append(
                f'<rect x="{_LEFT + column * pitch:.2f}" y="{y:.2f}" width="{pitch:.2f}" '
                f'height="{height:.2f}" fill="{_colour(ratio)}"><title>{escape(row_name)} {index}, '
                f"{escape(column_name)} {column}: {ratio:.2f} of the mean{note}</title></rect>"
            )
    marks += _legend(_TOP + len(rows) * height + 24)
    return width, total, marks


def _legend(y: float) -> list[str]:
    marks = []
    for index in range(5):
        x = _LEFT + index * 90
        word = {0: "none", 4: "4 x mean or more"}.get(index, f"{index} x mean")
        marks.append(
            f'<rect x="{x}" y="{y:.0f}" width="16" height="16" fill="{_colour(index)}" '
            f'stroke="#ccc"/><text x="{x + 22}" y="{y + 13:.0f}" fill="#555">{word}</text>'
        )
    return marks


def _colour(ratio: float) -> str:
    if ratio == 0:
        return _hex(_UNUSED)
    position = min(max(ratio, 0.0), len(_STOPS) - 1.001)
    index = int(position)
    part = position - index
    ends = zip(_STOPS[index], _STOPS[index + 1], strict=True)
    return _hex(round(a + (b - a) * part) for a, b in ends)


def _hex(channels: Iterable[int]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def check_picture_name(path: Path) -> None:
    """Raises UsageError for a name that ends in none of .png, .svg and .html, and where a .png
    needs a package that is missing."""
    if path.suffix not in (".png", ".svg", ".html"):
        raise UsageError(f"{path}: a picture ends in .png, .svg or .html")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise UsageError(
            f"{path}: a .png needs matplotlib: pip install 'moec[bench]', or write an .svg"
        )


def save_heat_map(path: Path, *tables: Table) -> None:
    """Write the picture of `heat_map` to `path`. Raises UsageError as `check_picture_name`."""
    check_picture_name(path)
    if path.suffix == ".png":
        _save_png(tables, path)
        return
    svg = heat_map(*tables)
    if path.suffix == ".svg":
        path.write_text(svg)
    else:
        head = (
            f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(tables[0].title)}</title>\n'
        )
        path.write_text(f'{head}<body style="margin:2em">\n{svg}</body>\n')


def _save_png(tables: Sequence[Table], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    ratios = [_ratios(table.rows) for table in tables]
    heights = [min(10.0, max(2.4, len(each) * 0.22 + 1.6)) for each in ratios]
    width = min(14.0, max(6.0, max(each.shape[1] for each in ratios) * 0.22 + 2.5))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    every = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    scale = LinearSegmentedColormap.from_list("load", [np.array(stop) / 255 for stop in _STOPS])
    colors = scale.with_extremes(under=[channel / 255 for channel in _UNUSED])
    for table, each, axes in zip(tables, ratios, every, strict=True):
        image = axes.imshow(
            each, cmap=colors, vmin=1e-9, vmax=len(_STOPS) - 1, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set(title=table.title, xlabel=table.column_name, ylabel=table.row_name)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        label = "times the mean of the row; below: none"
        figure.colorbar(image, ax=axes, label=label, extend="both")
    FigureCanvasAgg(figure).print_png(path)


def _ratios(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Multiples of the mean of each row, NaN where a row is shorter than others."""
    columns = max((len(row) for row in rows), default=1)
    ratios = np.full((max(1, len(rows)), columns), np.nan)
    for index, row in enumerate(rows):
        mean = float(row.mean()) if len(row) else 0.0
        ratios[index, : len(row)] = row / mean if mean > 0 else 0.0
    return ratios
