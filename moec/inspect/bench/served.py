"""The times of a server under several loads, as numbers, text and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.inspect.bench.clients import Answers, ServerLoad

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Served:
    """One load. Times are the percentiles 50, 95 and 99 in seconds: to the first token, between two
    events of a stream, and to the end; empty where no answer had one. `rate` are requests answered
    per second, `tokens_per_second` new tokens of all."""

    load: ServerLoad
    answered: int
    failed: int
    error: str
    rate: float
    tokens_per_second: float
    first: tuple[float, ...]
    between: tuple[float, ...]
    end: tuple[float, ...]


def served(load: ServerLoad, answers: Answers) -> Served:
    times = answers.times
    gaps = [gap for each in times for gap in np.diff(each.events)]
    return Served(
        load,
        len(times),
        len(answers.errors),
        answers.errors[0] if answers.errors else "",
        len(times) / answers.seconds,
        sum(each.tokens for each in times) / answers.seconds,
        _percentiles([each.events[0] for each in times]),
        _percentiles(gaps),
        _percentiles([each.end for each in times]),
    )


def _percentiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, np.percentile(values, PERCENTILES))) if len(values) else ()


@dataclass(frozen=True)
class ServedResult:
    """The loads of one server, in the order in which they came."""

    name: str
    machine: str
    lines: tuple[Served, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        load = self.lines[0].load
        head = (
            f"{self.name} on {self.machine}: {load.requests} requests of {load.prompt_tokens} + "
            f"{load.new_tokens} tokens for each load\n"
            "milliseconds: percentiles 50, 95, 99\n\n"
        )
        titles = ("load", "answered", "per s", "tokens/s", "first token", "between", "end")
        rows = [titles, *map(_row, self.lines)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        errors = [f"{line.load.name}: {line.failed} failed: {line.error}" for line in self.lines]
        faults = [text for line, text in zip(self.lines, errors, strict=True) if line.failed]
        return head + "\n".join([*lines, *faults])


def _row(line: Served) -> tuple[str, ...]:
    times = [" ".join(f"{1e3 * t:.0f}" for t in c) for c in (line.first, line.between, line.end)]
    rates = (f"{line.rate:.2f}", f"{line.tokens_per_second:.1f}")
    return (line.load.name, str(line.answered), *rates, *times)


def plot(result: ServedResult, path: Path) -> None:
    """Time to the first token and between tokens, and tokens per second, by load."""
    from matplotlib.figure import Figure

    names = [line.load.name for line in result.lines]
    figure = Figure(figsize=(10, 4))
    times, rates = figure.subplots(1, 2)
    for label, column in (("first token", "first"), ("between tokens", "between")):
        for number, style in ((0, "-o"), (1, "--o")):
            values = [1e3 * getattr(line, column)[number] for line in result.lines]
            times.plot(names, values, style, label=f"{label}, p{PERCENTILES[number]}")
    times.set(ylabel="milliseconds", yscale="log", title=result.name)
    times.yaxis.set_major_formatter("{x:g}")
    times.legend()
    rates.plot(names, [line.tokens_per_second for line in result.lines], "-o")
    rates.set(ylabel="new tokens per second", ylim=(0, None), title=result.machine)
    figure.tight_layout()
    figure.savefig(path)
