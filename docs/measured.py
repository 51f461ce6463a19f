"""The papers' headline figures next to our benchmarks' measurements, for docs/systems.md.

Figures that a test can count are in the system's record (tests/systems); these need a machine or
many seeds, and come from benchmarks/results/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.records import Cell, Record, newest, read_records

PREFERRED = "AMD EPYC, Zen 4"
"""The machine whose records are shown if there are several; docs/benchmarks has all of them."""


COMPARABLE = ""
NO_FIGURE = "no published figure"


@dataclass(frozen=True)
class Figure:
    """One quantity as counted or measured here, and as published.

    `differs` is why the two cannot be compared. It is `COMPARABLE`, empty, only if both are the
    same quantity of the same configuration.
    """

    quantity: str
    ours: str
    paper: str
    differs: str

    @property
    def verdict(self) -> str:
        return f"not comparable: {self.differs}" if self.differs else "comparable"


def measured() -> Mapping[int, tuple[Figure, ...]]:
    """The figures of each system, by its number."""
    records = list(read_records())
    figures: dict[int, tuple[Figure, ...]] = {
        2: tuple(einsum_moe(of(records, "einsum-moe"))),
        4: tuple(weights_averaging(of(records, "ewa"))),
        6: tuple(zero_experts(of(records, "zero-experts"))),
        19: (
            *compressed(of(records, "compressed-kernels")),
            *compressed_models(of(records, "compressed-model")),
        ),
        23: tuple(caches(of(records, "read-me-cache"))),
    }
    for number, figure in published_sizes(of(records, "published-sizes")):
        figures[number] = (*figures.get(number, ()), figure)
    return figures


def of(records: Iterable[Record], claim: str) -> list[Record]:
    """The newest record of each case, from one machine."""
    cases: dict[str, Record] = {}
    for record in newest(r for r in records if r.claim == claim):
        if record.case not in cases or record.machine == PREFERRED:
            cases[record.case] = record
    return list(cases.values())


def einsum_moe(records: Iterable[Record]) -> Iterator[Figure]:
    for record in records:
        for row in record.rows:
            quantity = f"times faster than einsums, {record.case}, {row['tokens']} tokens"
            paper = "7.3 at most, Fig. 11"
            yield Figure(quantity, f"{row['ratio']}", paper, "whole models on GPUs there")


def weights_averaging(records: Iterable[Record]) -> Iterator[Figure]:
    for record in records:
        for row in record.rows:
            gain = row.get("over dense, seed by seed")
            if gain is not None:
                quantity = f"points of accuracy over dense, digits, {record.case}"
                yield Figure(quantity, f"{gain}", "a gain, by the abstract", NO_FIGURE)


def zero_experts(records: Iterable[Record]) -> Iterator[Figure]:
    for record in records:
        for row in record.rows:
            quantity = f"experts' time over a vanilla MoE's, {record.case}, tau {row['tau']}"
            ours = f"{row['ratio']:.3f} (theory {row['theory']:.3f})"
            yield Figure(quantity, ours, f"{row['paper']:.3f}", "measured on GPUs there")


def compressed(records: Iterable[Record]) -> Iterator[Figure]:
    for record in records:
        rows = [row for row in record.rows if row["kind"] == "ternary"]
        if record.case != "one row by one expert" or not rows:
            continue
        quantity = f"times smaller than bf16, products of {len(rows)} shapes of the paper"
        smaller = between(rows, "times smaller")
        yield Figure(quantity, smaller, "20.07, MoE layers of c2048", "random weights here")
        quantity = f"time over bf16's, the same products, {record.machine}"
        ratios = between(rows, "ratio")
        yield Figure(quantity, ratios, "below 1 for each product", "measured on GPUs there")


def compressed_models(records: Iterable[Record]) -> Iterator[Figure]:
    for record in records:
        for row in record.rows:
            words = "1 token" if row["tokens"] == 1 else f"{row['tokens']} tokens"
            quantity = f"time of a model over bf16's, {record.case}, {words}, {record.machine}"
            paper = "below 1.05, next to an estimate of bf16 with one expert"
            yield Figure(quantity, f"{row['ratio']}", paper, "a smaller model here, GPUs there")


SIZES_DIFFER = {
    1: "other positions and norms",
    5: "widths chosen here",
    6: "a name of one digit",
}
"""Of the systems whose size at the published configuration is not the published quantity."""


def published_sizes(records: Iterable[Record]) -> Iterator[tuple[int, Figure]]:
    """The models that were built with weights, by the number of their system."""
    for record in records:
        (row,) = record.rows
        system, _, name = record.case.partition(", ")
        agreement = f"; {row['error']} from eager" if "error" in row else ""
        ours = f"{row['parameters, M']}M, {row['difference, %']:+} %{agreement}"
        number = int(system.partition(" ")[0])
        differs = SIZES_DIFFER.get(number, COMPARABLE)
        published = f"{row['published, M']:g}M"
        yield number, Figure(f"{name} with weights, built and run", ours, published, differs)


def between(rows: Iterable[Mapping[str, Cell]], column: str) -> str:
    values = [float(str(row[column])) for row in rows]
    return f"{min(values):.2f} to {max(values):.2f}"


PAPER_HITS = {
    2: "34.19, 33.90, 44.16 %",
    3: "50.14, 52.42, 61.82 %",
    4: "67.52, 66.95, 77.21 %",
}
"""Table 4 of arXiv 2410.19123, for seven experts: random, LRU, Belady."""


def caches(records: Iterable[Record]) -> Iterator[Figure]:
    for record in records:
        for row in record.rows:
            size = int(str(row["cached experts"]))
            quantity = f"hits of a cache of {size}: random, LRU, Belady; {record.case}"
            ours = ", ".join(f"{row[f'{policy} %']}" for policy in ("random", "lru", "belady"))
            paper = f"{PAPER_HITS[size]}, 7 experts"
            yield Figure(quantity, f"{ours} %", paper, "another model, 5 experts here")
