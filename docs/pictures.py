"""Draws docs/images/pipeline.svg from the tables of moec/pipeline.py.

python -m docs.pictures
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from moec import pipeline
from moec.ir.graph import Stage

PICTURE = Path(__file__).parent / "images" / "pipeline.svg"

LINE, WIDTH, GAP, MARGIN, HEAD, IN_A_ROW = 17, 144, 24, 14, 58, 5
COLOURS = {0: "#1d4f91", 1: "#2a7f62", 2: "#8a5a00"}
ASKED, PLAIN = "#9b2d5e", "#333333"


@dataclass(frozen=True)
class Column:
    """A box: its title, the stage of the graph in it, and its lines with their colours."""

    title: str
    stage: str
    lines: Sequence[tuple[str, str]]


def columns() -> tuple[Column, ...]:
    """The stages of a model, left to right, then the second row."""
    return (
        Column("capture", "module, checkpoint", _plain(("torch.export", "assumptions proved"))),
        Column(
            "canonicalise", "Graph[ATEN]", [*_phase(pipeline.CANONICALISE), *_opt_in(Stage.ATEN)]
        ),
        Column("dense", "Graph[ATEN]", [*_phase(pipeline.DENSE)]),
        Column("recognise", "Graph[MOE]", [*_phase(pipeline.RECOGNISE)]),
        Column("simplify", "Graph[MOE]", [*_phase(pipeline.SIMPLIFY)]),
        Column("opt-in", "Graph[MOE]", [*_opt_in(Stage.MOE)]),
        Column(
            "lower",
            "Graph[GROUPED]",
            [*_phase(pipeline.LOWER), *_opt_in(Stage.GROUPED), *_quantising()],
        ),
        Column("decode", "the next token", [*_phase(pipeline.DECODE)]),
        Column("generate code", "Package", _plain(("kernels", "loops", "library", "or ONNX"))),
        Column("run", "numbers", _plain(("no torch", "no compiler", "checked files"))),
    )


def _plain(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, PLAIN) for name in names]


def _phase(phase: pipeline.Phase) -> Iterator[tuple[str, str]]:
    """The passes in order, in the colours of their levels."""
    yield from ((pass_.name, COLOURS[level]) for level, pass_ in phase.leveled)


def _opt_in(stage: Stage) -> Iterator[tuple[str, str]]:
    """The passes that run only on request; approximate ones take recognised blocks."""
    for kind in pipeline.OPT_IN:
        if getattr(kind, "takes", Stage.MOE) is stage:
            yield str(kind.name), ASKED


def _quantising() -> Iterator[tuple[str, str]]:
    yield from ((pass_.name, ASKED) for _, pass_ in pipeline.ON_REQUEST)


def picture() -> str:
    """The SVG."""
    boxes = columns()
    rows = [boxes[start : start + IN_A_ROW] for start in range(0, len(boxes), IN_A_ROW)]
    return "\n".join(_svg(rows)) + "\n"


def _svg(rows: Sequence[Sequence[Column]]) -> Iterator[str]:
    width = IN_A_ROW * (WIDTH + GAP) + 2 * MARGIN - 6
    heights = [HEAD + max(len(box.lines) for box in row) * LINE + MARGIN for row in rows]
    height = sum(heights) + 2 * MARGIN + LINE
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" role="img">'
    )
    yield "<title>The passes of moec, from a PyTorch model to numbers</title>"
    yield f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
    top = MARGIN
    for number, row in enumerate(rows):
        for position, box in enumerate(row):
            x = MARGIN + GAP - 6 + position * (WIDTH + GAP)
            yield from _box(box, x, top)
            if number or position:
                yield _arrow(x, top + 24)
        top += heights[number]
    yield from _legend(height)
    yield "</svg>"


def _arrow(x: int, y: int) -> str:
    """An arrow to a box whose left side is at x."""
    return (
        f'<path d="M{x - GAP + 4} {y} h{GAP - 9} m-5 -4 l5 4 l-5 4" fill="none" '
        f'stroke="{PLAIN}" stroke-width="1.5"/>'
    )


def _box(box: Column, x: int, top: int) -> Iterator[str]:
    height = HEAD + len(box.lines) * LINE
    yield (
        f'<rect x="{x}" y="{top}" width="{WIDTH}" height="{height}" rx="6" fill="#f6f7f9" '
        f'stroke="#c4c9d0"/>'
    )
    yield _text(x + 10, top + 20, box.title, PLAIN, ' font-weight="bold" font-size="14"')
    yield _text(x + 10, top + 38, box.stage, "#6a707a", ' font-family="monospace"')
    for number, (line, colour) in enumerate(box.lines):
        yield _text(x + 10, top + HEAD + number * LINE + 4, line, colour)


def _legend(height: int) -> Iterator[str]:
    words = [
        ("-O0: needed", COLOURS[0]),
        ("-O1: MoE fusions", COLOURS[1]),
        ("-O2: other fusions", COLOURS[2]),
        ("opt-in", ASKED),
    ]
    for number, (word, colour) in enumerate(words):
        yield _text(MARGIN + number * 150, height - MARGIN, word, colour)


def _text(x: int, y: int, text: str, colour: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}"{style}>{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
