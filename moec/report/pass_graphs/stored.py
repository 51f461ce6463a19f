"""The graphs after each pass as a part of an artifact, which may come from an untrusted source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import msgspec
from msgspec.structs import replace

from moec.errors import ArtifactError
from moec.ir.graph import Graph, Op
from moec.passes.core.runner import PassResult
from moec.report.data import DeclinedLine
from moec.report.pass_graphs.table import GraphStep, GraphTable, OpRow, PassHunks, steps_of
from moec.report.report import inside

_LINE = re.compile(r"[^\s(`]+\.py:\d+")


class DeclinedRow(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A candidate with the step whose graph has it, the position of its op there, and its line;
    without them where no op is of its module."""

    where: str
    rule: str
    reason: str
    step: int | None = None
    op: int | None = None
    line: str = ""


def declined_row(line: DeclinedLine, steps: Sequence[GraphStep]) -> DeclinedRow:
    row = DeclinedRow(where=line.where, rule=line.rule, reason=line.reason)
    names = [step.name for step in steps]
    # The graph that the rule read is the one before its pass.
    step = max(0, names.index(line.rule) - 1) if line.rule in names else 0
    at = op_of(line, steps[step].graph)
    if at is None:
        return row
    return replace(row, step=step, op=at, line=steps[step].graph.ops[at].line)


def op_of(line: DeclinedLine, graph: Graph) -> int | None:
    """The position of the op that the reason is about: the one at the line that it cites or whose
    value it names, else the first one of the module."""
    cited = next(iter(_LINE.findall(line.reason)), "")
    words = set(re.findall(r"[\w.]+", line.reason)) - {value.name for value in graph.outputs}
    ops = [(at, op) for at, op in enumerate(graph.ops) if not line.where or _is_of(op, line.where)]
    choices = (
        (at for at, op in ops if cited and op.line.startswith(cited + ":") and op.name in words),
        (at for at, op in ops if cited and (op.line + ":").startswith(cited + ":")),
        (at for at, op in enumerate(graph.ops) if words & {v.name for v in op.outputs}),
        (at for at, op in ops if line.where),
    )
    return next((at for choice in choices for at in choice), None)


def _is_of(op: Op, module: str) -> bool:
    return inside(op.origin.split(" ")[0], module)


class StoredPasses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graph `main` after each pass, with the texts and ops of all; the user's lines have their
    code, and graphs the names of their values."""

    texts: list[str]
    ops: list[OpRow]
    steps: list[PassHunks]
    declined: list[DeclinedRow]

    def table(self) -> GraphTable:
        """The texts and ops, to which those of other graphs can be added."""
        texts = {text: number for number, text in enumerate(self.texts)}
        return GraphTable(texts, {row: number for number, row in enumerate(self.ops)})

    def check(self, last: int) -> None:
        """Raises ValueError where a number is none of a text or op, or the last graph has not
        `last` ops."""
        if len({*self.texts}) < len(self.texts) or len({*self.ops}) < len(self.ops):
            raise ValueError("it has a text or an op twice")
        for *texts, inputs, outputs in self.ops:
            _check(chain(texts, inputs, outputs), len(self.texts), "text")
        counts = [0]
        for step in self.steps:
            at = 0
            for position, removed, added in step.hunks:
                _check([position - at, removed], counts[-1] + 1, "position")
                at = position + removed
                _check(added, len(self.ops), "op")
            _check([at], counts[-1] + 1, "position")
            counts.append(counts[-1] + sum(len(new) - old for _, old, new in step.hunks))
        if not self.steps or counts[1:] != [step.ops for step in self.steps] or counts[-1] != last:
            raise ValueError("its graphs are not those of main")
        for row in self.declined:
            if row.step is not None and row.op is not None:
                _check([row.step], len(self.steps), "step")
                _check([row.op], counts[row.step + 1], "position")


def _check(numbers: Sequence[int] | chain[int], end: int, what: str) -> None:
    if any(not 0 <= number < end for number in numbers):
        raise ValueError(f"it has a number of no {what}")


def passes_part(results: Sequence[PassResult], declined: Sequence[DeclinedLine]) -> bytes:
    """The content of the part."""
    steps, table = list(steps_of(results)), GraphTable()
    rows = table.steps(steps)
    candidates = [declined_row(line, steps) for line in declined]
    return msgspec.json.encode(StoredPasses(list(table.texts), list(table.ops), rows, candidates))


def read_passes(path: Path, content: bytes, last: int) -> StoredPasses:
    """What `passes_part` wrote, of a graph `main` with `last` ops. Raises ArtifactError where it is
    malformed."""
    try:
        passes = msgspec.json.decode(content, type=StoredPasses)
        passes.check(last)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: its graphs after passes are malformed: {error}; compile the model again"
        ) from error
    return passes
