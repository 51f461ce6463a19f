"""The report of a compilation in a few lines: blocks, verification, size and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moec.files.printable import all_printable
from moec.passes.core.damage import Damage
from moec.report.damage_text import distance
from moec.report.data import Block, ErrorLine, QuantisedLine, ReportData
from moec.report.module_paths import collapse_layer_indices
from moec.report.units import count, counted, seconds, size

LONG = 4096
"""A size up to which users expect a model to work, as they expect it to for 1."""


def brief(report: ReportData) -> str:
    """A title, a line for each of these subjects, what approximations changed, and the notes."""
    report = ReportData.of_dict(all_printable(report.to_dict()))
    lines = [f"{report.model} for {report.target}" if report.target else report.model]
    lines += [f"{subject:11} {fact}" for subject, fact in _facts(report)]
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _facts(report: ReportData) -> Iterator[tuple[str, str]]:
    if limits := [line for name, line in _limits(report.sizes) if name.isidentifier()]:
        yield "sizes", f"calls are refused unless {' and '.join(limits)}"
    yield "blocks", _blocks(report.blocks)
    if report.declined:
        yield "declined", f"{counted(len(report.declined), 'module')} considered, not rewritten"
    if report.loops:
        yield "loops", f"{counted(len(report.loops), 'op')} without a kernel: plain loops"
    for damage in report.damage:
        yield "changed", _changed(damage)
    if report.quantised:
        yield "quantised", _quantised(report.quantised)
    if report.moved:
        rows = ", ".join(f"{m.moved} of {m.rows} rows of {m.output}" for m in report.moved)
        yield "", f"{rows} have another argmax than unquantised"
    reference = "the quantised graph" if report.quantised else "eager"
    yield "verified", _verified(report.verification, reference)
    if report.checked_kernels:
        yield "code", report.checked_kernels
    active = f", {count(report.active_parameters)} active per token" if report.blocks else ""
    packed = "" if report.bytes_out is None else f"{size(report.bytes_out)}, "
    yield "size", f"{packed}{count(report.parameters)} parameters{active}"
    if report.phases:
        longest = sorted(report.phases.items(), key=lambda item: -item[1])[:2]
        most = ", ".join(f"{name} {seconds(time)}" for name, time in longest)
        yield "time", f"{seconds(sum(report.phases.values()))}, of which {most}"


def _limits(sizes: Mapping[str, tuple[int, int | None]]) -> Iterator[tuple[str, str]]:
    """The names of sizes that may not be 1, or not `LONG`, and within what they have to be."""
    for name, (low, high) in sizes.items():
        if high is not None and high < LONG:
            yield name, f"{name} is {low}" if low == high else f"{name} is from {low} to {high}"
        elif low > 1:
            yield name, f"{name} is at least {low}"


def _blocks(blocks: Sequence[Block]) -> str:
    if not blocks:
        return "no MoE block was recognised: the model is compiled without MoE kernels"
    choices = sorted({(block.top_k, block.experts) for block in blocks})
    chosen = ", ".join(f"{top_k} of {experts}" for top_k, experts in choices)
    names = collapse_layer_indices([block.name for block in blocks])
    return f"{counted(len(blocks), 'MoE block')} ({names}), {chosen} experts per token"


def _changed(damage: Damage) -> str:
    weights = f"{size(damage.bytes_before)} to {size(damage.bytes_after)} of weights"
    return f"{damage.name}: {weights}, {distance(damage.original, damage.after)}"


def _quantised(lines: Sequence[QuantisedLine]) -> str:
    formats = ", ".join(dict.fromkeys(line.format for line in lines))
    covered, parts = (sum(getattr(line, name) for line in lines) for name in ("covered", "parts"))
    worst = max(line.worst for line in lines)
    return f"{formats}: {covered} of {parts} parts, error of weights at most {worst:.1e}"


def _verified(lines: Sequence[ErrorLine], reference: str) -> str:
    if not lines:
        return "no: the code was not compared with eager"
    worst = max(lines, key=lambda line: line.error / line.tolerance)
    rows = "" if worst.error <= worst.tolerance else ", except single rows: see the note"
    return (
        f"against {reference}: error of {worst.output} {worst.error:.1e}, "
        f"{worst.tolerance:.0e} allowed{rows}"
    )
