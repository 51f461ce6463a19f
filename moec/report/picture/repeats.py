"""Collapses equal layers to one part with a count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from moec.report.data import Block, DeclinedLine, PortLine


def collapse(parts: Sequence[ScenePart], edges: Edges) -> tuple[list[ScenePart], Edges]:
    """Collapse runs of layers that differ only in their number to one part with a count.

    A layer may consist of several parts: blocks with additions between them.
    """
    collapsed: list[ScenePart] = []
    new_index: list[int] = []  # the index of each old part in the result
    at = 0
    while at < len(parts):
        length, times = _period(parts, edges, at)
        group = parts[at : at + length * times]
        if times == 1:
            collapsed.append(replace(group[0], label=label(group[:1])))
        elif length == 1:
            collapsed.append(replace(group[0], label=label(group), times=times))
        else:
            collapsed.append(_layer(group, _inner_edges(edges, at, length), length, times))
        new_index += [len(collapsed) - 1] * len(group)
        at += len(group)
    new_edges = {(ENTRY if a == ENTRY else new_index[a], new_index[b]) for a, b in edges}
    return collapsed, tuple(sorted((a, b) for a, b in new_edges if a < b - 1))


def _period(parts: Sequence[ScenePart], edges: Edges, at: int) -> tuple[int, int]:
    """The number of parts from `at` that form a layer, and of its repeats; (1, 1) for no layer."""
    for length in range(1, 7):
        first = parts[at : at + length]
        if not any(is_numbered(p) for p in first):
            continue
        want = [signature(p) for p in first], _inner_edges(edges, at, length)
        times = 1
        while (
            [signature(p) for p in parts[at + times * length : at + (times + 1) * length]],
            _inner_edges(edges, at + times * length, length),
        ) == want:
            times += 1
        if times > 1:
            return length, times
    return 1, 1


def _inner_edges(edges: Edges, at: int, length: int) -> Edges:
    """The edges that end in the `length` parts from `at`, with indices relative to `at`."""
    return tuple((a - at if a >= at else ENTRY, b - at) for a, b in edges if at <= b < at + length)


HEAVY = ("moe.", "grouped.", "nn.", "moec.", "aten.linear", "aten.embedding", "aten.scaled_dot")


def is_numbered(part: ScenePart) -> bool:
    return part.path.rpartition(".")[2].isdigit()


def _layer(group: Sequence[ScenePart], edges: Edges, length: int, times: int) -> ScenePart:
    first = group[:length]
    return ScenePart(
        first[0].path,
        label([p for p in group if is_numbered(p)]),
        "frame",
        sum(p.parameters for p in first),
        times=times,
        parts=tuple(replace(p, label=label([p])) for p in first),
        edges=edges,
    )


def label(parts: Sequence[ScenePart]) -> str:
    """The label of a part: its name, or for a number the name of its list and the number."""
    if not is_numbered(parts[0]):
        return parts[0].label
    *_, name, number = f".{parts[0].path}".split(".")
    last = parts[-1].path.rpartition(".")[2]
    return f"{name} {number}" + (f" … {last}" if last != number else "")


def signature(part: ScenePart) -> object:
    """The key that two parts must share to be collapsed."""
    if part.kind == "sum":
        return "sum"
    return (
        part.label if not part.label.isdigit() else "",
        part.kind,
        part.parameters,
        tuple(sorted((n, c) for n, c in part.ops.items() if n.startswith(HEAVY))),
        tuple(kind for _, kind in part.weights),
        tuple(replace(block, name="") for block in part.blocks),
        tuple((d.reason, d.rule) for d in part.declined),
        tuple(map(signature, part.parts)),
        part.edges,
    )


Edges: TypeAlias = tuple[tuple[int, int], ...]

KINDS = ("moe", "router", "shared", "attention", "mlp", "linear", "embedding", "norm", "other")
ENTRY = -1  # the source of an edge that comes from above the parts


@dataclass(frozen=True)
class ScenePart:
    """One box. `edges` are the skip connections among `parts`, by index; ENTRY is the top."""

    path: str
    label: str
    kind: str
    parameters: int = 0
    ops: Mapping[str, int] = field(default_factory=dict)
    weights: tuple[tuple[str, str], ...] = ()
    tied: tuple[str, ...] = ()  # weights that it reads and another part holds
    times: int = 1
    blocks: tuple[Block, ...] = ()  # of an MoE card; nearly always one
    declined: tuple[DeclinedLine, ...] = ()
    parts: tuple[ScenePart, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Scene:
    """A model. `parts` flow from `inputs` to `outputs`."""

    title: str
    inputs: tuple[PortLine, ...]
    outputs: tuple[PortLine, ...]
    root: ScenePart

    @property
    def parameters(self) -> int:
        return self.root.parameters
