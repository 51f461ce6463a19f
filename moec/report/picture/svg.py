"""A scene as SVG: one column from top to bottom, with frames for opened parts and cards for others.

Plain SVG with a style sheet: light and dark follow the reader's system; no script, no web fonts.
Sizes are in pixels; the width of text is estimated, and text is cut to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import quoteattr

from moec.report.data import PortLine
from moec.report.picture.marks import (
    DARK,
    STYLE,
    Canvas,
    arrow,
    chip,
    num,
    pill,
    rect,
    text,
    tip,
    wrapped,
)
from moec.report.picture.part import ENTRY, Scene, ScenePart
from moec.report.text import shape
from moec.report.units import count

CARD, MOE, GAP, PAD, LANE = 340, 520, 26, 26, 22
NAMES = {
    "moe": "experts",
    "router": "routers",
    "shared": "shared experts",
    "attention": "attention",
    "mlp": "dense MLP",
    "linear": "linear",
    "embedding": "embedding",
    "norm": "norms",
    "other": "other",
}


def hover(part: ScenePart) -> str:
    lines = [part.path or part.label]
    if part.parameters:
        lines.append(f"{count(part.parameters)} parameters, {count(part.active)} active")
    lines += [f"tied to {name}" for name in part.tied]
    lines += [f"{d.rule}: {d.reason}" for d in part.declined]
    return "\n".join(lines)


def svg(scene: Scene) -> tuple[str, list[ScenePart]]:
    """The picture, and the part of each `data-part` number."""
    canvas = Canvas(total=max(scene.parameters, 1))
    width = max(measure(scene.root)[0] + 2 * PAD, MOE + 120)
    middle = width / 2
    y = _header(canvas, scene, width)
    y = _ports(canvas, scene.inputs, middle, y)
    arrow(canvas, middle, y, y + GAP)
    y = _column(canvas, scene.root, middle, y + GAP, first=y + 4)
    arrow(canvas, middle, y, y + GAP)
    y = _ports(canvas, scene.outputs, middle, y + GAP)
    y = _declined_list(canvas, scene, width, y + 18)
    height = y + PAD - 8
    style = f"{STYLE}@media (prefers-color-scheme:dark){{{DARK}}}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {num(width)} {num(height)}" '
        f'width="{num(width)}" height="{num(height)}" role="img" '
        f"aria-label={quoteattr(scene.title)}>"
    )
    body = "\n".join(canvas.marks)
    paper = f'<rect class="paper" width="{num(width)}" height="{num(height)}" rx="12"/>'
    return f"{head}\n<style>{style}</style>\n{paper}\n{body}\n</svg>\n", canvas.parts


# ---- sizes -----------------------------------------------------------------------------


def measure(part: ScenePart) -> tuple[float, float]:
    """Width and height, including the lanes of skip connections and the edge of a stack."""
    if part.kind == "sum":
        return 24, 24
    if part.blocks:
        return MOE, _moe_height(part)
    if not part.parts:
        return CARD, 34 if part.kind in ("norm", "other") else 50
    sizes = [measure(p) for p in part.parts]
    width = max(w for w, _ in sizes) + 2 * (LANE * _lanes(part) + (PAD if part.path else 0))
    inner = sum(h for _, h in sizes) + GAP * (len(sizes) - 1)
    if not part.path:
        return width, inner
    return width + (16 if part.times > 1 else 0), inner + 2 * GAP + 22 + (
        8 if part.times > 1 else 0
    )


def _lanes(part: ScenePart) -> int:
    return max(lanes(part.edges), default=-1) + 1


def lanes(edges: Sequence[tuple[int, int]]) -> list[int]:
    """A lane for each edge; edges whose spans overlap have different lanes."""
    lane_ends: list[int] = []  # by lane: where its last edge ends
    lane_of: dict[tuple[int, int], int] = {}
    for start, end in sorted(set(edges)):
        lane = next((i for i, stop in enumerate(lane_ends) if stop <= start), len(lane_ends))
        lane_ends[lane : lane + 1] = [end]
        lane_of[start, end] = lane
    return [lane_of[edge] for edge in edges]


def _cells(experts: int) -> tuple[int, int, float]:
    """Columns, rows and pitch of the grid of experts."""
    columns = experts if experts <= 16 else 16 if experts <= 64 else 32 if experts <= 256 else 48
    rows = -(-experts // columns)
    return columns, rows, min(26.0, (MOE - 60) / columns)


def _moe_height(part: ScenePart) -> float:
    block = part.blocks[0]
    _, rows, pitch = _cells(block.experts)
    shared = 34 if block.shared else 0
    return 42 + 30 + 28 + rows * pitch + 22 + 30 + shared + 14 + 16 * len(foot(part))


def _shared_words(shared: str) -> str:
    return "+ shared expert" + (f", {shared}" if shared not in ("", "added") else "")


def foot(part: ScenePart) -> list[str]:
    """The last lines of an MoE card."""
    block = part.blocks[0]
    summary = f"{block.activation} experts, written as {block.form}"
    if len(part.blocks) > 1:
        summary += f"; first of {len(part.blocks)} MoE blocks here"
    return [summary, *wrapped(f"kernels: {block.kernel}", 80)] if block.kernel else [summary]


# ---- parts -----------------------------------------------------------------------------


def _part(canvas: Canvas, part: ScenePart, middle: float, y: float) -> None:
    canvas.open(part, hover(part))
    if part.kind == "sum":
        canvas.add(
            f'<circle class="card" cx="{num(middle)}" cy="{num(y + 12)}" r="11"/>',
            f'<path class="wire" d="M{num(middle - 5)} {num(y + 12)}h10m-5 -5v10"/>',
        )
    elif part.blocks:
        _moe(canvas, part, middle, y)
    elif part.parts:
        _frame(canvas, part, middle, y)
    else:
        _card(canvas, part, middle, y)
    canvas.close()


def _card(canvas: Canvas, part: ScenePart, middle: float, y: float) -> None:
    width, height = measure(part)
    x = middle - width / 2
    canvas.add(rect(x, y, width, height, "card" + (" dashed s-embedding" if part.declined else "")))
    strip = f"M{num(x + 6)} {num(y)}a6 6 0 0 0 -6 6v{num(height - 12)}a6 6 0 0 0 6 6z"
    canvas.add(f'<path class="k-{part.kind}" d="{strip}"/>')
    low = height < 40
    canvas.add(text(x + 18, y + (22 if low else 21), part.label, "ink name", 26))
    words = "tied" if part.tied else count(part.parameters) if part.parameters else ""
    if words:
        canvas.add(text(x + width - 14, y + (22 if low else 21), words, "soft small", 12, "end"))
    if low:
        return
    caption = f"tied to {part.tied[0]}" if part.tied else NAMES[part.kind]
    if part.declined:
        caption = f"not recognised: {part.declined[0].reason}"
    canvas.add(text(x + 18, y + 39, caption, "soft small", 36))
    _share(canvas, part, x + width - 94, y + 33, 80)


def _share(canvas: Canvas, part: ScenePart, x: float, y: float, width: float) -> None:
    """A bar with the part's share of the model's parameters."""
    share = part.parameters / canvas.total
    if share <= 0:
        return
    canvas.add(rect(x, y, width, 5, "rail", 2.5))
    canvas.add(rect(x, y, max(width * share, 3), 5, f"k-{part.kind}", 2.5))


def _frame(canvas: Canvas, part: ScenePart, middle: float, y: float) -> None:
    width, height = measure(part)
    if part.times > 1:
        width, height = width - 16, height - 8
        for shift in (8, 4):
            canvas.add(rect(middle - width / 2 + shift, y + shift, width, height, "frame", 12))
    x = middle - width / 2
    canvas.add(rect(x, y, width, height, "frame", 12))
    canvas.add(text(x + 16, y + 23, part.label, "ink name", 40))
    if part.times > 1:
        chip(canvas, x + 26 + 7.6 * len(part.label), y + 9, f"\u00d7 {part.times}", "attention")
    each = " each" if part.times > 1 else ""
    canvas.add(
        text(x + width - 16, y + 23, f"{count(part.parameters)}{each}", "soft small", 30, "end")
    )
    top = y + 22 + GAP
    canvas.add(f'<path class="wire" d="M{num(middle)} {num(y + 30)}v{num(GAP - 8)}"/>')
    bottom = _column(canvas, part, middle, top, first=y + 32)
    canvas.add(f'<path class="wire" d="M{num(middle)} {num(bottom)}V{num(y + height)}"/>')


def _column(canvas: Canvas, part: ScenePart, middle: float, y: float, first: float) -> float:
    """The inner parts in a column, with arrows and skips. Returns the y of their end."""
    tops: list[float] = []
    heights = [measure(p)[1] for p in part.parts]
    for i, height in enumerate(heights):
        if i:
            arrow(canvas, middle, y, y + GAP)
            y += GAP
        tops.append(y)
        y += height
    widest = max((measure(p)[0] for p in part.parts), default=0)
    for (start, end), lane in zip(part.edges, lanes(part.edges), strict=True):
        left = middle - widest / 2 - LANE * (lane + 1) + 4
        leave = first if start == ENTRY else tops[start] + heights[start] + 7
        canvas.add(
            f'<path class="wire" d="M{num(middle)} {num(leave)}H{num(left + 8)}q-8 0 -8 8'
            f'V{num(tops[end] + 4)}q0 8 8 8H{num(middle - 16)}"/>',
            tip(middle - 11, tops[end] + 12, "right"),
        )
    for inner, top in zip(part.parts, tops, strict=True):
        _part(canvas, inner, middle, top)
    return y


def _moe(canvas: Canvas, part: ScenePart, middle: float, y: float) -> None:
    block = part.blocks[0]
    width, height = measure(part)
    x = middle - width / 2
    canvas.add(rect(x, y, width, height, "card", 12))
    canvas.add(
        rect(x, y, width, height, "k-moe tint", 12), rect(x, y, width, height, "edge s-moe", 12)
    )
    canvas.add(text(x + 18, y + 26, part.label, "ink name", 26))
    chip(canvas, x + 32 + 8 * min(len(part.label), 26), y + 12, "MoE", "moe")
    share = f"{count(part.parameters)}, {count(part.active)} active"
    canvas.add(text(x + width - 18, y + 26, share, "soft small", 34, "end"))
    top = y + 42
    pill(canvas, middle, top, 300, f"router: {block.router}", "router")
    columns, rows, pitch = _cells(block.experts)
    left, grid = middle - columns * pitch / 2, top + 30 + 28
    chosen = chosen_cells(block.experts, block.top_k)
    total = grid + rows * pitch + 22
    for expert in range(block.experts):
        cx, cy = left + expert % columns * pitch, grid + expert // columns * pitch
        canvas.add(rect(cx + 1.5, cy, pitch - 3, pitch - 3, "k-moe ghost", 4))
    for expert in chosen:
        cx = left + (expert % columns + 0.5) * pitch
        cy = grid + (expert // columns) * pitch
        into = f"C{num(middle)} {num(top + 46)} {num(cx)} {num(cy - 18)} {num(cx)} {num(cy)}"
        low = cy + pitch - 3
        out = f"C{num(cx)} {num(low + 17)} {num(middle)} {num(total - 16)} {num(middle)}"
        canvas.add(
            f'<path class="fan s-moe" d="M{num(middle)} {num(top + 28)}{into}"/>',
            f'<path class="fan s-moe" d="M{num(cx)} {num(low)}{out} {num(total)}"/>',
        )
    for expert in chosen:
        cx, cy = left + expert % columns * pitch, grid + expert // columns * pitch
        canvas.add(rect(cx + 1.5, cy, pitch - 3, pitch - 3, "k-moe", 4))
    pill(
        canvas,
        middle,
        total,
        300,
        f"weighted sum of {block.top_k} of {block.experts} experts",
        "moe",
    )
    if block.shared:
        total += 34
        pill(canvas, middle, total, 300, _shared_words(block.shared), "shared")
    for i, line in enumerate(foot(part)):
        canvas.add(text(middle, total + 46 + 16 * i, line, "soft small", 84, "middle"))


def chosen_cells(experts: int, top_k: int) -> list[int]:
    """The experts to draw as chosen: spread over the grid, not quite evenly."""
    step = experts / max(top_k, 1)
    return sorted({int(i * step) + (i * 5 + 2) % max(int(step), 1) for i in range(top_k)})


# ---- around the parts ------------------------------------------------------------------


def _header(canvas: Canvas, scene: Scene, width: float) -> float:
    """Title, totals, a bar of the parameters by kind, and the legend of its colors."""
    canvas.add(text(PAD, 42, scene.title, "ink title", int(width / 13)))
    blocks = _count_blocks(scene.root)
    facts = f"{count(scene.parameters)} parameters"
    if blocks:
        share = scene.active / canvas.total
        facts += f", {count(scene.active)} active per token ({share:.0%}), {blocks} MoE "
        facts += "block" if blocks == 1 else "blocks"
    else:
        facts += ", no MoE block"
    canvas.add(text(PAD, 64, facts, "soft", int(width / 7)))
    split = {k: n for k in NAMES if (n := scene.root.split.get(k, 0))}
    full = width - 2 * PAD
    canvas.add(
        f'<clipPath id="bar">{rect(PAD, 78, full, 12, "", 6)}</clipPath><g clip-path="url(#bar)">'
    )
    x = float(PAD)
    for kind, parameters in split.items():
        part = full * parameters / canvas.total
        canvas.add(rect(x, 78, part, 12, f"k-{kind}", 0))
        x += part
    canvas.add("</g>")
    x, y = float(PAD), 110.0
    for kind, parameters in split.items():
        share = parameters / canvas.total
        label = f"{NAMES[kind]} {share:.0%}" if share >= 0.005 else f"{NAMES[kind]} <1%"
        step = 30 + 6.9 * len(label)
        if x + step > width - PAD + 14:
            x, y = float(PAD), y + 20
        canvas.add(rect(x, y - 9, 10, 10, f"k-{kind}", 3), text(x + 15, y, label, "soft small", 40))
        x += step
    return y + 26


def _count_blocks(part: ScenePart) -> int:
    return len(part.blocks) + sum(_count_blocks(p) * p.times for p in part.parts)


def _ports(canvas: Canvas, ports: Sequence[PortLine], middle: float, y: float) -> float:
    """Inputs or outputs: one chip each, in a column."""
    for line in ports[:8]:
        label = f"{line.name}  {shape(line)}"
        width = 28 + 7.1 * min(len(label), 60)
        canvas.add(
            rect(middle - width / 2, y, width, 26, "card", 13),
            text(middle, y + 17, label, "ink mono", 60, "middle"),
        )
        y += 32
    if len(ports) > 8:
        canvas.add(text(middle, y + 12, f"and {len(ports) - 8} more", "soft small", 40, "middle"))
        y += 22
    return y - 6


def _declined_list(canvas: Canvas, scene: Scene, width: float, y: float) -> float:
    """Every declined candidate with its reason."""
    declined = _all_declined(scene.root)
    if not declined:
        return y
    canvas.add(text(PAD, y + 16, "Considered, not rewritten", "ink name", 60))
    y += 24
    for where, rule, reason in declined:
        canvas.add(text(PAD, y + 14, f"{where}: {rule}", "ink mono", int(width / 7.4)))
        y += 18
        for line in wrapped(reason, int((width - 2 * PAD) / 6.1)):
            canvas.add(text(PAD, y + 13, line, "soft small", 400))
            y += 16
        y += 6
    return y


def _all_declined(part: ScenePart) -> list[tuple[str, str, str]]:
    lines = [(d.where, d.rule, d.reason) for d in part.declined]
    return [*lines, *(line for inner in part.parts for line in _all_declined(inner))]
