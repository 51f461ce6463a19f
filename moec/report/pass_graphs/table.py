"""Graphs as data: each op once, however many passes leave it as it is.

Texts are numbered, ops are rows of numbers of texts, and a pass is the hunks by which its graph
differs from the one before. 10,000 ops and 45 passes take a few megabytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from moec.ir.graph import Graph, Op
from moec.ir.text import print_graph, show_attr
from moec.passes.core.runner import PassResult

Hunk = tuple[int, int, list[int]]
"""Position in the graph before, the number of its ops that are gone, and the ops instead."""
OpRow = tuple[int, int, int, int, int, tuple[int, ...], tuple[int, ...]]
"""The numbers of an op's name, attributes, module, line and body, its inputs, and for each output
those of name and type."""


@dataclass(frozen=True)
class GraphStep:
    """A graph, and the pass that built it; the first is that of the capture."""

    name: str
    graph: Graph
    stage: str = ""
    rewrites: int = 0
    seconds: float = 0.0


class PassHunks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step of `ops` ops as its difference to the one before."""

    name: str
    stage: str
    rewrites: int
    seconds: float
    ops: int
    hunks: list[Hunk]


def steps_of(results: Sequence[PassResult]) -> Iterator[GraphStep]:
    for result in results:
        stage, graph = result.stage.name, result.program.graph
        yield GraphStep(result.name, graph, stage, result.rewrites, result.seconds)


@dataclass
class GraphTable:
    """The texts and ops of all graphs, by number."""

    texts: dict[str, int] = field(default_factory=dict)
    ops: dict[OpRow, int] = field(default_factory=dict)
    _numbers: dict[Op, int] = field(default_factory=dict)

    def text(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def op(self, op: Op) -> int:
        if op not in self._numbers:
            attrs = ", ".join(f"{name}={show_attr(value)}" for name, value in op.attrs.items())
            body = print_graph(op.body) if op.body is not None else ""
            row: OpRow = (
                self.text(op.name), self.text(attrs), self.text(op.origin), self.text(op.line),
                self.text(body), tuple(self.text(value.name) for value in op.inputs),
                tuple(self.text(t) for v in op.outputs for t in (v.name, str(v.type))),
            )  # fmt: skip
            self._numbers[op] = self.ops.setdefault(row, len(self.ops))
        return self._numbers[op]

    def steps(self, steps: Sequence[GraphStep]) -> list[PassHunks]:
        """Graphs in order, each as its difference to the one before."""
        before: list[int] = []
        rows = []
        for step in steps:
            after = [self.op(op) for op in step.graph.ops]
            facts = (step.name, step.stage, step.rewrites, step.seconds, len(after))
            rows.append(PassHunks(*facts, hunks(before, after)))
            before = after
        return rows


def ports(graph: Graph) -> dict[str, list[tuple[str, str]]]:
    """The inputs and outputs of a graph."""
    return {
        "inputs": [(value.name, str(value.type)) for value in graph.inputs],
        "outputs": [(value.name, str(value.type)) for value in graph.outputs],
    }


def hunks(before: Sequence[int], after: Sequence[int]) -> list[Hunk]:
    """The fewest changes that lead from one list of distinct numbers to the other: all but a
    longest common subsequence, which for distinct numbers is a longest increasing one."""
    position = {number: at for at, number in enumerate(before)}
    common = [(position[n], at) for at, n in enumerate(after) if n in position]
    changes: list[Hunk] = []
    i = j = 0
    for p, q in [*_increasing(common), (len(before), len(after))]:
        if (i, j) != (p, q):
            changes.append((i, p - i, list(after[j:q])))
        i, j = p + 1, q + 1
    return changes


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A longest part of the pairs in which the first numbers increase."""
    lasts: list[int] = []  # by length: the least first number with which such a part ends
    ends: list[int] = []  # by length: the pair with which it ends
    previous: list[int] = []
    for at, (p, _) in enumerate(pairs):
        length = bisect_left(lasts, p)
        lasts[length : length + 1] = [p]
        ends[length : length + 1] = [at]
        previous.append(ends[length - 1] if length else -1)
    part = []
    at = ends[-1] if ends else -1
    while at >= 0:
        part.append(pairs[at])
        at = previous[at]
    return part[::-1]
