"""Drawing primitives for SVG: colors for light and dark, boxes, text, arrows."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from moec.report.picture.part import ScenePart

LIGHT = {
    "moe": "#7c3aed", "router": "#db2777", "shared": "#0e9aa7", "attention": "#2563eb",
    "mlp": "#059669", "linear": "#64a30d", "embedding": "#d97706", "norm": "#94a3b8",
    "other": "#b6bec9",
}  # fmt: skip
DARK_COLORS = {
    "moe": "#a78bfa", "router": "#f472b6", "shared": "#2dd4bf", "attention": "#60a5fa",
    "mlp": "#34d399", "linear": "#a3e635", "embedding": "#fbbf24", "norm": "#7d8896",
    "other": "#4b5563",
}  # fmt: skip


def _theme(colors: dict[str, str], paper: str, frame: str, card: str, ink: str, soft: str,
           line: str) -> str:  # fmt: skip
    rules = [
        f".paper{{fill:{paper}}}.frame{{fill:{frame};stroke:{line}}}",
        f".card{{fill:{card};stroke:{line}}}.ink{{fill:{ink}}}.soft{{fill:{soft}}}",
        f".wire{{stroke:{soft}}}.tip{{fill:{soft}}}.rail{{fill:{line}}}.back{{fill:{paper}}}",
        *(f".k-{k}{{fill:{c}}}.s-{k}{{stroke:{c}}}" for k, c in colors.items()),
    ]
    return "".join(rules)


STYLE = (
    "text{font:13px ui-sans-serif,system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}"
    ".mono{font:11.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
    ".small{font-size:11.5px}.title{font-size:21px;font-weight:650}.name{font-weight:600}"
    ".wire{fill:none;stroke-width:1.4}.fan{fill:none;stroke-width:1.2;opacity:.6}"
    ".white{fill:#fff}.tint{opacity:.09}.ghost{opacity:.22}.edge{fill:none;stroke-width:1.5}"
    ".dashed{stroke-dasharray:4 3}"
    + _theme(LIGHT, "#ffffff", "#f5f7fa", "#ffffff", "#1a2029", "#5d6876", "#d5dbe3")
)
DARK = _theme(DARK_COLORS, "#0f141b", "#161d27", "#1e2733", "#e8edf4", "#9aa7b8", "#344051")


@dataclass
class Canvas:
    """Markup in drawing order. `parts[i]` is the part with `data-part` number i."""

    marks: list[str] = field(default_factory=list)
    parts: list[ScenePart] = field(default_factory=list)
    total: int = 1

    def add(self, *marks: str) -> None:
        self.marks += marks

    def open(self, part: ScenePart, hover: str) -> None:
        self.add(
            f'<g class="part" data-part="{len(self.parts)}">', f"<title>{escape(hover)}</title>"
        )
        self.parts.append(part)

    def close(self) -> None:
        self.add("</g>")


def num(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def rect(x: float, y: float, width: float, height: float, kind: str, radius: float = 6) -> str:
    return (
        f'<rect class="{kind}" x="{num(x)}" y="{num(y)}" width="{num(width)}" '
        f'height="{num(height)}" rx="{num(radius)}"/>'
    )


def text(x: float, y: float, words: str, kind: str, most: int, anchor: str = "start") -> str:
    shown = words if len(words) <= most else words[: most - 1] + "…"
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{num(x)}" y="{num(y)}"{where}>{escape(shown)}</text>'


def chip(canvas: Canvas, x: float, y: float, words: str, kind: str) -> None:
    width = 16 + 6.8 * len(words)
    canvas.add(
        rect(x, y, width, 19, f"k-{kind}", 9.5),
        f'<text class="back small name" x="{num(x + width / 2)}" y="{num(y + 13.5)}" '
        f'text-anchor="middle">{escape(words)}</text>',
    )


def pill(canvas: Canvas, middle: float, y: float, width: float, words: str, kind: str) -> None:
    width = max(width, 28 + 6.4 * min(len(words), 68))
    x = middle - width / 2
    canvas.add(rect(x, y, width, 28, "card", 14), rect(x, y, width, 28, f"edge s-{kind}", 14))
    canvas.add(text(middle, y + 18.5, words, "ink small", 68, "middle"))


def arrow(canvas: Canvas, x: float, top: float, bottom: float) -> None:
    canvas.add(
        f'<path class="wire" d="M{num(x)} {num(top)}V{num(bottom - 5)}"/>', tip(x, bottom, "down")
    )


def tip(x: float, y: float, way: str) -> str:
    shape = "l-4 -7h8z" if way == "down" else "l-7 -4v8z"
    return f'<path class="tip" d="M{num(x)} {num(y)}{shape}"/>'


def wrapped(words: str, width: int) -> list[str]:
    return textwrap.wrap(words, width) or [""]
