"""A scene as a Graphviz file, which draws it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moec.errors import SetupError
from moec.files.os_errors import reason
from moec.report.data import PortLine
from moec.report.picture.repeats import ENTRY, Scene, ScenePart
from moec.report.text import shape
from moec.report.units import count

COLORS = {
    "moe": "#7c3aed", "router": "#db2777", "shared": "#0e9aa7", "attention": "#2563eb",
    "mlp": "#059669", "linear": "#64a30d", "embedding": "#d97706", "norm": "#94a3b8",
    "other": "#b6bec9",
}  # fmt: skip


def save(scene: Scene, path: Path) -> None:
    """Write the scene to a file. Raises UsageError where it cannot be written."""
    try:
        path.write_text(dot(scene), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {reason(error)}") from error


def dot(scene: Scene) -> str:
    return "\n".join(_lines(scene)) + "\n"


def _lines(scene: Scene) -> Iterator[str]:
    yield f"digraph {quoted(scene.title)} {{"
    yield '  graph [fontname="Helvetica"]'
    yield '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="Helvetica"]'
    for side, ports in (("in", scene.inputs), ("out", scene.outputs)):
        yield f'  {side} [shape=plain, style="", label={quoted(_ports(ports))}]'
    yield from _inner_lines(scene.root, "n", "  ")
    parts = scene.root.parts
    if parts:
        yield f"  in -> {first(parts[0], 'n_0')}"
        yield f"  {last(parts[-1], f'n_{len(parts) - 1}')} -> out"
    yield "}"


def _inner_lines(part: ScenePart, name: str, indent: str) -> Iterator[str]:
    for i, inner in enumerate(part.parts):
        node_id = f"{name}_{i}"
        if inner.parts:
            times = f" x {inner.times}" if inner.times > 1 else ""
            yield f"{indent}subgraph cluster_{node_id} {{"
            yield f"{indent}  label={quoted(f'{inner.label}{times}')}; style=rounded"
            yield from _inner_lines(inner, node_id, indent + "  ")
            yield f"{indent}}}"
        elif inner.kind == "sum":
            yield f'{indent}{node_id} [label="+", shape=circle]'
        else:
            color = COLORS[inner.kind]
            yield f"{indent}{node_id} [label={quoted(_label(inner))}, color={quoted(color)}]"
        if i:
            before = part.parts[i - 1]
            yield f"{indent}{last(before, f'{name}_{i - 1}')} -> {first(inner, node_id)}"
    for start, end in part.edges:
        if start != ENTRY:
            source = last(part.parts[start], f"{name}_{start}")
            yield f"{indent}{source} -> {first(part.parts[end], f'{name}_{end}')}"


def first(part: ScenePart, name: str) -> str:
    return first(part.parts[0], f"{name}_0") if part.parts else name


def last(part: ScenePart, name: str) -> str:
    if not part.parts:
        return name
    return last(part.parts[-1], f"{name}_{len(part.parts) - 1}")


def _label(part: ScenePart) -> str:
    lines = [part.label]
    for block in part.blocks:
        lines.append(f"MoE: {block.top_k} of {block.experts} experts")
        lines.append(f"{block.router}; {block.activation}")
    if part.parameters:
        lines.append(f"{count(part.parameters)} parameters")
    lines += [f"tied to {name}" for name in part.tied]
    return "\n".join(lines)


def _ports(ports: tuple[PortLine, ...]) -> str:
    return "\n".join(f"{line.name}: {shape(line)}" for line in ports)


def quoted(words: str) -> str:
    return json.dumps(words, ensure_ascii=False)
