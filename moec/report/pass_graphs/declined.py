"""Where in a graph, and in the user's code, a candidate is that a rule declined."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from moec.ir.graph import Graph, Op
from moec.report.data import DeclinedLine
from moec.report.pass_graphs.table import GraphStep
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
