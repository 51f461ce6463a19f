"""A comparison as a page: that of `moec explore`, with the graphs of A and B as its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from moec.exploration.page import page
from moec.report.data import ReportData
from moec.report.pass_graphs.table import GraphStep, GraphTable, ports


def comparison_page(
    comparison: Mapping[str, Any], graphs: Mapping[str, Sequence[GraphStep]]
) -> str:
    """The HTML, which loads nothing from elsewhere. `graphs` has those of A and B by function."""
    table = GraphTable()
    functions = [
        {"name": name, "steps": table.steps(steps), **ports(steps[-1].graph)}
        for name, steps in graphs.items()
    ]
    names = next(fact for fact in comparison["facts"] if fact["subject"] == "artifact")
    data = {
        "title": f"{names['a']} and {names['b']}",
        "artifact": False,
        "report": ReportData("").to_dict(),
        "functions": msgspec.to_builtins(functions),
        "texts": list(table.texts),
        "ops": list(table.ops),
        "comparison": comparison,
    }
    empty: dict[str, Any] = dict.fromkeys(("declined", "calls", "weights"), ())
    return page(data | empty | dict.fromkeys(("profile", "routing", "plan")))
