"""A table of numbers as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moec.errors import SetupError, UsageError

_STOPS = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107), (165, 15, 21))
"""Colors of 0, 1, 2, 3 and 4 times the mean: from white over blue to red."""
_UNUSED = (250, 214, 140)
"""The color of exactly 0, such as an expert that no token chose: amber."""


@dataclass(frozen=True)
class Table:
    """A row of cells for each array."""

    rows: Sequence[NDArray[np.float64]]
    title: str
    row_name: str
    column_name: str


def check_picture_name(path: Path) -> None:
    """Raises UsageError for a name that ends in neither .png nor .svg, and without matplotlib."""
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"{path}: a picture ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise SetupError(f"{path}: a picture needs matplotlib: pip install 'moec[bench]'")


def save_heat_map(path: Path, *tables: Table) -> None:
    """Draw tables, one below the other. The color of a cell is its multiple of the row's mean:
    amber 0, light blue 1, dark blue 3, red 4 and more. Raises UsageError as
    `check_picture_name`."""
    check_picture_name(path)
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
    figure.savefig(path)


def _ratios(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Multiples of the mean of each row, NaN where a row is shorter than others."""
    columns = max((len(row) for row in rows), default=1)
    ratios = np.full((max(1, len(rows)), columns), np.nan)
    for index, row in enumerate(rows):
        mean = float(row.mean()) if len(row) else 0.0
        ratios[index, : len(row)] = row / mean if mean > 0 else 0.0
    return ratios
