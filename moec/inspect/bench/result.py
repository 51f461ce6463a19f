"""The results of a benchmark as numbers, text and a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from moec.inspect.bench.race import Figure, Load, Times, ratio

BUSY = 0.7
"""The load average above which something ran in the minute before."""


@dataclass(frozen=True)
class MeasuredLimits:
    """Limits measured in the same run: FLOP/s of all threads in dtype `kind`, and bytes/s of all
    threads; and the least seconds of a prefill and of a step at these rates."""

    kind: str
    peak: float
    bandwidth: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class ContenderLine:
    """One contender; `prefill_ahead` and `decode_ahead` are its times over moec's."""

    name: str
    prefill: Figure
    decode: Figure
    prefill_ahead: float
    decode_ahead: float


@dataclass(frozen=True)
class BenchResult:
    """All results; `prefill_share` and `decode_share` are moec's shares of the limits."""

    model: str
    dtype: str
    machine: str
    threads: int
    versions: Mapping[str, str]
    load: Load
    limits: MeasuredLimits
    lines: tuple[ContenderLine, ...]
    prefill_share: float
    decode_share: float
    load_average: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def section(self, command: str) -> str:
        """The results as a section of a Markdown file."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        title = f"{self.model}, {self.dtype}, {self.load.batch} x {self.load.prompt} tokens"
        body = f"    $ {command}\n\n" + textwrap.indent(str(self), "    ")
        return f"\n## {title}\n\n{date.today()}, {versions}\n\n{body}\n"

    def __str__(self) -> str:
        load, limits = self.load, self.limits
        rows = [
            f"{self.model}, {self.dtype}, {self.threads} threads, {self.machine}",
            f"measured peak {limits.peak / 1e9:.0f} GFLOP/s in {limits.kind}, bandwidth "
            f"{limits.bandwidth / 1e9:.1f} GB/s, load average {self.load_average:.1f} before",
            f"{load.batch} x {load.prompt} tokens of prefill, then {load.batch} x {load.new} "
            "decoded one by one; medians, and the middle half of all measurements",
            "",
            f"{'':12} {'prefill, tokens/s':>30} {'':>7} {'decode, tokens/s':>30} {'':>7}",
        ]
        for line in self.lines:
            rows.append(
                f"{line.name:12} {_shown(line.prefill):>30} {_times(line.prefill_ahead):>7} "
                f"{_shown(line.decode):>30} {_times(line.decode_ahead):>7}"
            )
        rows += [
            "",
            f"moec's prefill is at {self.prefill_share:.0%} of the limit, its decode at "
            f"{self.decode_share:.0%}. Columns after the speeds: time relative to moec.",
        ]
        if self.load_average > BUSY:
            rows.append(
                f"Something ran before (load average {self.load_average:.1f}): if it still did, "
                "the times depend on it, and an idle machine gives others."
            )
        return "\n".join(rows)


def result(
    model: str,
    dtype: str,
    machine: str,
    threads: int,
    versions: Mapping[str, str],
    load: Load,
    limits: MeasuredLimits,
    times: list[Times],
    load_average: float,
) -> BenchResult:
    """The result of a run; `times` begins with moec's."""
    ours = times[0]
    lines = tuple(
        ContenderLine(
            t.name,
            Figure.of(t.prefill, load.batch * load.prompt),
            Figure.of(t.decode, load.batch),
            ratio(ours.prefill, t.prefill),
            ratio(ours.decode, t.decode),
        )
        for t in times
    )
    tokens = load.batch * load.prompt
    return BenchResult(
        model,
        dtype,
        machine,
        threads,
        versions,
        load,
        limits,
        lines,
        limits.prefill * lines[0].prefill.median / tokens,
        limits.decode * lines[0].decode.median / load.batch,
        load_average,
    )


def _shown(figure: Figure) -> str:
    return f"{figure.median:.1f} ({figure.low:.1f} to {figure.high:.1f})"


def _times(ahead: float) -> str:
    return f"{ahead:.2f}x"


def plot(report: BenchResult, path: Path) -> None:
    """A bar chart of both rates with the limits."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    tokens = {"prefill": report.load.batch * report.load.prompt, "decode": report.load.batch}
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        figures: list[Figure] = [getattr(line, phase) for line in report.lines]
        names = [line.name for line in report.lines]
        low = [f.median - f.low for f in figures]
        high = [f.high - f.median for f in figures]
        colours = ["#0b6e4f"] + ["#9aa5a1"] * (len(names) - 1)
        axis.bar(names, [f.median for f in figures], yerr=[low, high], color=colours, capsize=3)
        axis.axhline(tokens[phase] / getattr(report.limits, phase), color="#b23a48", linestyle="--")
        axis.set_title(f"{phase}, tokens a second (dashed: the machine's limit)", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.model}, {report.dtype}, {report.threads} threads", fontsize=10)
    figure.savefig(path, dpi=150)
