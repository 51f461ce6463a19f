"""Counts the outcomes of single operators of ATen, and names those that are refused.

python -m tests.fuzz.operators --record FILE
python -m benchmarks.operators FILE --record benchmarks/results/operators.jsonl
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.target.cpu import processor
from tests.fuzz.judge import Outcome
from tests.fuzz.operators import RANDOM, read

OUTCOMES = {
    Outcome.DENSE: "right",
    Outcome.WRONG: "wrong",
    Outcome.CRASH: "internal error",
    RANDOM: "not tried: random results",
    Outcome.EAGER: "not tried: no small dense sample that runs",
}
REFUSALS = {
    "no kernel": "has no kernel|is none of ATen's|UnsupportedOperator",
    "random numbers": "random numbers|reads from its data|different results",
    "writes into its input": "writes into its input",
    "data decide sizes, or what is computed": "on the data|DataDep|DynamicOutput|decide|how many",
    "another number of results for other sizes": "return the same number always",
    "sizes that torch.export fixed": "torch.export fixed|example's sizes|cannot be kept",
    "a dtype or a layout": "no dtype|layout",
    "other reasons": "",
}
"""Words of the errors of refused operators, by why they are refused."""


def outcome(line: Mapping[str, Any]) -> str:
    if line["outcome"] in OUTCOMES:
        return OUTCOMES[line["outcome"]]
    return next(
        f"refused: {why}" for why, words in REFUSALS.items() if re.search(words, line["words"])
    )


def rows(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Cell]]:
    """The operators of each outcome."""
    first, last = [*OUTCOMES.values()][:3], [*OUTCOMES.values()][3:]
    names: dict[str, list[str]] = {
        name: [] for name in (*first, *(f"refused: {why}" for why in REFUSALS), *last)
    }
    for line in lines:
        names[outcome(line)].append(line["name"])
    return [
        {"outcome": name, "count": len(each), "names": "" if name == "right" else ", ".join(each)}
        for name, each in names.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operators")
    parser.add_argument(
        "outcomes", type=Path, help="the --record of python -m tests.fuzz.operators"
    )
    add_record_options(parser, processor())
    options = parser.parse_args()
    table = rows(read(options.outcomes).values())
    for row in table:
        print(f"{row['count']:6} {row['outcome']}")
    record_if_asked(options, "operators", "float32", table, "")


if __name__ == "__main__":
    main()
