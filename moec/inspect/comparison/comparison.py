"""The comparison of two artifacts A and B: data, and its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from typing import Any

import msgspec

from moec.files.printable import columns, preformatted, printable
from moec.inspect.exploration.page import page
from moec.report.data import MovedLine
from moec.report.pass_graphs.table import GraphStep, GraphTable, ports
from moec.report.units import size, spans


@dataclass(frozen=True)
class ComparedFact:
    """A text or a number (of bytes, if that is the subject) of both; None where one lacks it."""

    subject: str
    name: str
    a: str | int | None
    b: str | int | None


@dataclass(frozen=True)
class OutputLine(MovedLine):
    """`error` is that of B against A, relative to the norm. In rows with another argmax, A scores
    its choice at most `margin` higher than B's; `gap` is the median, over all rows, of how much
    higher A scores its first choice than its second. `kl` is the KL divergence of B's next token
    from A's, in nats per token; None where the output has no scores of tokens."""

    margin: float
    gap: float
    kl: float | None


@dataclass(frozen=True, repr=False)
class ArtifactComparison:
    """`altered` are the arrays of one format with other values, with the experts that differ;
    `inputs` says what both ran on; `routing` is the share of tokens with the same set of experts,
    by layer. `times` are median milliseconds of calls in turn, and of the quotient B / A in each
    turn the median (`ratio`) and quartiles. `notes` say what is not compared, and why. `graphs`
    are those of A and B by function, for the page."""

    facts: tuple[ComparedFact, ...]
    altered: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: str = ""
    outputs: tuple[OutputLine, ...] = ()
    routing: Mapping[str, float] = field(default_factory=dict)
    times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    graphs: Mapping[str, tuple[GraphStep, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        tables = (
            [("", "", "A", "B"), *map(_cells, self.facts)],
            [("other values", "experts"), *((n, spans(e) or "-") for n, e in self.altered.items())],
            [tuple(f.name for f in fields(OutputLine)), *map(_cells, self.outputs)],
            [("layer", "same experts"), *((n, f"{s:.1%}") for n, s in self.routing.items())],
            [
                ("time, ms", "A", "B", "B / A", "from", "to"),
                *((n, *(f"{v:.3g}" for v in t.values())) for n, t in self.times.items()),
            ],
        )
        parts = [[line.rstrip() for line in columns(t)] for t in tables if len(t) > 1]
        parts += [[f"ran on {self.inputs}"]] if self.inputs else []
        parts += [[f"note: {note}"] for note in self.notes]
        return printable("\n\n".join(map("\n".join, parts)))

    __repr__ = __str__  # so that `moec.compare(a, b)` at a prompt shows it

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-compatible dicts, lists and numbers."""
        data = asdict(replace(self, graphs={}))
        del data["graphs"]
        return data

    def page(self) -> str:
        """One HTML page, which needs nothing else: the comparison, and the graphs of A and B beside
        each other."""
        return comparison_page(self.to_dict(), self.graphs)

    def _repr_html_(self) -> str:
        return preformatted(str(self))


def _cells(line: Any) -> tuple[str, ...]:
    show = size if getattr(line, "subject", "") == "bytes" else str
    cells = (f"{v:.3g}" if isinstance(v, float) else v for v in astuple(line))
    return tuple("-" if v is None else show(v) if isinstance(v, int) else v for v in cells)


def comparison_page(
    comparison: Mapping[str, Any], graphs: Mapping[str, Sequence[GraphStep]]
) -> str:
    """The HTML of `moec explore`, with `graphs` of A and B by function as its steps."""
    table = GraphTable()
    functions = [
        {"name": name, "steps": table.steps(steps), **ports(steps[-1].graph)}
        for name, steps in graphs.items()
    ]
    names = next(fact for fact in comparison["facts"] if fact["subject"] == "artifact")
    return page(
        {
            "title": f"{names['a']} and {names['b']}",
            "functions": msgspec.to_builtins(functions),
            "texts": list(table.texts),
            "ops": list(table.ops),
            "comparison": comparison,
        }
    )
