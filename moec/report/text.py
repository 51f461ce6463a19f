"""A report as text: sentences and tables."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moec.files.printable import all_printable
from moec.report.damage_text import parts as damage_parts
from moec.report.data import (
    Block,
    DeclinedLine,
    ErrorLine,
    LoopLine,
    MovedLine,
    PassLine,
    PortLine,
    QuantisedLine,
    ReportData,
)
from moec.report.units import collapse_layer_indices, count, seconds, size, spans
from moec.runtime.sizes.expressions import multiple_of

if TYPE_CHECKING:
    from rich.console import RenderableType


UNWRAPPED = 10_000  # columns


def shape(line: PortLine) -> str:
    return f"{line.dtype}[{', '.join(line.shape)}]"


def render(report: ReportData, width: int = 100, color: bool = False) -> str:
    """The report as text, at most `width` columns wide."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=color,
        no_color=not color,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    for part in _parts(ReportData.of_dict(all_printable(report.to_dict()))):
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def terminal_width() -> int:
    """The terminal's width, within limits. Piped output is not wrapped unless COLUMNS is set."""
    if not (sys.stdout.isatty() or os.environ.get("COLUMNS")):
        return UNWRAPPED
    return min(max(shutil.get_terminal_size((100, 24)).columns, 40), 140)


def _parts(report: ReportData) -> Iterable[RenderableType]:
    from rich.text import Text

    title = f"{report.model} for {report.target}" if report.target else report.model
    yield Text(title, style="bold")
    yield _facts(report)
    yield ""
    if report.blocks:
        yield from _blocks(report.blocks)
    else:
        yield Text("No MoE block was recognised: the model is compiled without MoE kernels.")
    if report.declined:
        yield ""
        yield _declined(report.declined)
    if report.passes:
        yield ""
        yield _passes(report.passes)
    if report.loops:
        yield ""
        yield _loops(report.loops)
    for damage in report.damage:
        yield ""
        yield from damage_parts(damage)
    if report.quantised:
        yield ""
        yield _quantised(report.quantised)
        yield from _calibrated(report.quantised)
    if report.verification or report.checked_kernels:
        yield ""
    if report.verification:
        yield _verification(report.verification, bool(report.quantised))
    yield from map(Text, report.checked_kernels.splitlines())
    if report.moved:
        yield ""
        yield _quantised_outputs(report.moved)
    for note in report.notes:
        yield Text(f"note: {note}")


def _grid(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        right = column in ("rewrites", "ops", "seconds")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _facts(report: ReportData) -> Any:
    table = _facts_grid()
    total, active = report.parameters, report.active_parameters
    if total:
        share = f", {count(active)} active per token ({active / total:.0%})"
        table.add_row("parameters", f"{count(total)} total" + (share if report.blocks else ""))
    if report.bytes_by_dtype:
        parts = " + ".join(f"{size(n)} {dtype}" for dtype, n in report.bytes_by_dtype.items())
        packed = "" if report.bytes_out is None else f", {size(report.bytes_out)} packed"
        table.add_row("weights", parts + packed)
    for label, ports in (
        ("inputs", report.inputs),
        ("outputs", report.outputs),
        ("states", report.states),
    ):
        for i, line in enumerate(ports):
            table.add_row(label if i == 0 else "", f"{line.name}: {shape(line)}")
    if report.sizes:
        table.add_row("sizes", ", ".join(_bounds(n, *b) for n, b in report.sizes.items()))
    if report.kernels:
        shown = ", ".join(f"{n} x {name}" for name, n in report.kernels.items())
        table.add_row("kernels", shown)
    if report.phases:
        table.add_row("took", ", ".join(f"{n} {seconds(s)}" for n, s in report.phases.items()))
    return table


def _bounds(name: str, low: int, high: int | None) -> str:
    if multiple := multiple_of(name):
        dividend, number = multiple
        return f"{dividend} a multiple of {number}"
    return f"{name} from {low}" if high is None else f"{name} {low} to {high}"


def _blocks(blocks: Sequence[Block]) -> Iterable[RenderableType]:
    """The blocks; blocks that differ only in their names are described once."""
    from rich.padding import Padding
    from rich.text import Text

    plural = "block" if len(blocks) == 1 else "blocks"
    yield Text(f"{len(blocks)} MoE {plural}", style="bold")
    groups: dict[Block, list[str]] = {}
    for block in blocks:
        groups.setdefault(replace(block, name=""), []).append(block.name)
    for block, names in groups.items():
        yield Text(collapse_layer_indices(names))
        table = _facts_grid()
        each = " each" if len(names) > 1 else ""
        table.add_row("experts", f"{block.top_k} of {block.experts} per token, {block.activation}")
        if block.zero:
            table.add_row("or one of", f"{block.zero}: experts without a network")
        table.add_row("router", block.router)
        if block.shared:
            table.add_row("shared", block.shared)
        table.add_row(
            "parameters",
            f"{count(block.parameters)}{each}, {count(block.active_parameters)} active per token",
        )
        table.add_row("written as", block.form)
        if block.kernel:
            table.add_row("kernel", block.kernel)
        yield Padding(table, (0, 0, 0, 2))


def _facts_grid() -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column(overflow="fold")
    return table


def _declined(declined: Sequence[DeclinedLine]) -> Any:
    table = _grid("Considered, not rewritten", "rule", "why")
    groups: dict[tuple[str, str], list[str]] = {}
    for line in declined:
        groups.setdefault((line.rule, line.reason), []).append(line.where)
    for (rule, reason), paths in groups.items():
        table.add_row(collapse_layer_indices(paths), rule, reason)
    return table


def _loops(loops: Sequence[LoopLine]) -> Any:
    table = _grid("Run as plain loops, without a kernel", "op", "why")
    groups: dict[tuple[str, str], list[str]] = {}
    for line in loops:
        groups.setdefault((line.op, line.reason), []).append(line.where)
    for (op, reason), origins in groups.items():
        table.add_row(collapse_layer_indices(origins), op, reason)
    return table


def _passes(passes: Sequence[PassLine]) -> Any:
    table = _grid("Pass", "stage", "rewrites", "ops", "seconds")
    for line in passes:
        table.add_row(
            line.name, line.stage, str(line.rewrites or "-"), str(line.ops), f"{line.seconds:.2f}"
        )
    return table


def _quantised(lines: Sequence[QuantisedLine]) -> Any:
    """A line for each module, and one for all of them."""
    table = _grid("Quantised", "format", "covered", "bytes", "error", "worst expert")
    for line in lines:
        table.add_row(
            line.name,
            line.format,
            f"{line.covered} of {line.parts}",
            f"{size(line.bytes_before)} to {size(line.bytes_after)}",
            f"{line.error:.1e}",
            f"{line.worst:.1e}",
        )
    if len(lines) > 1:
        before, after = (
            sum(getattr(line, name) for line in lines) for name in ("bytes_before", "bytes_after")
        )
        table.add_row(
            "in all",
            "",
            f"{sum(line.covered for line in lines)} of {sum(line.parts for line in lines)}",
            f"{size(before)} to {size(after)}",
            f"{(sum(line.error**2 for line in lines) / len(lines)) ** 0.5:.1e}",
            f"{max(line.worst for line in lines):.1e}",
        )
    return table


def _calibrated(lines: Sequence[QuantisedLine]) -> Iterator[Any]:
    """The errors with and without calibration, and experts with too few rows for it."""
    from rich.text import Text

    fitted = [line for line in lines if line.solved is not None]
    if not fitted:
        return
    yield ""
    table = _grid(
        "Calibrated", "fewest rows", "error when rounded to nearest", "error after calibration"
    )
    for line in fitted:
        table.add_row(line.name, str(line.fewest), f"{line.nearest:.1e}", f"{line.solved:.1e}")
    yield table
    for line in fitted:
        if line.few:
            yield Text(
                f"note: too few rows for experts {spans(line.few)} of {line.name}: they are "
                "rounded to nearest"
            )


def _quantised_outputs(lines: Sequence[MovedLine]) -> Any:
    table = _grid("Against the unquantised model", "error", "rows whose argmax differs")
    for line in lines:
        table.add_row(line.output, f"{line.error:.1e}", f"{line.moved} of {line.rows}")
    return table


def _verification(lines: Sequence[ErrorLine], quantised: bool) -> Any:
    against = "the quantised graph" if quantised else "eager"
    table = _grid(f"Checked against {against}", "error", "allowed", "")
    for line in lines:
        table.add_row(
            line.output,
            f"{line.error:.1e}",
            f"{line.tolerance:.0e}",
            "ok" if line.error <= line.tolerance else "ok, each kernel is: see the note",
        )
    return table
