"""The report on a compilation, and functions that fill its fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.files.printable import all_printable, preformatted
from moec.passes.core.damage import Damage
from moec.report.damage_text import distance
from moec.report.data import WHOLE, Block, PassLine, PortLine, QuantisedLine, ReportData
from moec.report.units import collapse_layer_indices, count, counted, seconds, size

if TYPE_CHECKING:
    import torch

    from moec.ir.graph import Graph, Value
    from moec.passes.core.runner import PassResult


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
    yield "verified", _verified(report)
    for line in report.checked_kernels.splitlines():
        yield "", line
    if report.text:
        yield "text", report.text
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


def _verified(report: ReportData) -> str:
    if report.verified == "quick":
        return "quick: the graph and the weights, without running the code"
    if not report.verification:
        return "no: the code was not compared with eager"
    reference = "the quantised graph" if report.quantised else "eager"
    worst = max(report.verification, key=lambda line: line.error / line.tolerance)
    rows = "" if worst.error <= worst.tolerance else ": each kernel is right, see the note"
    return (
        f"against {reference}: error of {worst.output} {worst.error:.1e}, "
        f"{worst.tolerance:.0e} allowed{rows}"
    )


@dataclass(frozen=True, repr=False)
class Report(ReportData):
    """The data of a report, printed as text."""

    def __str__(self) -> str:
        from moec.report.text import render

        return render(self)

    @property
    def brief(self) -> str:
        """Blocks, verification, size and time, a line each; approximations and notes."""

        return brief(self)

    __repr__ = __str__  # so that `m.report()` at a prompt shows it

    def _repr_html_(self) -> str:
        return preformatted(str(self))


def describe_graph(graph: Graph, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of a Report that follow from a graph and its weights: sizes, ports, parameters."""
    from moec.ir.stats import count_weights

    parameters, bytes_by_dtype = count_weights(graph, weights)
    before = [state.before for state in graph.states]
    return {
        "parameters": parameters,
        "bytes_by_dtype": bytes_by_dtype,
        "inputs": tuple(port(v) for v in graph.inputs if v not in before),
        "outputs": tuple(port(v) for v in graph.outputs),
        "states": tuple(port(v) for v in before),
        "sizes": {name: (b.low, b.high) for name, b in graph.bounds.items()},
    }


def port(value: Value) -> PortLine:
    from moec.ir.sizes.dims import show_dim

    return PortLine(value.name, value.dtype, tuple(map(show_dim, value.shape)))


def pass_lines(pass_results: Iterable[PassResult]) -> tuple[PassLine, ...]:
    return tuple(
        PassLine(s.name, s.stage.name, s.rewrites, len(s.program.graph.ops), s.seconds)
        for s in pass_results
    )


def kernels_of(path: str, kernels: Sequence[tuple[str, str]]) -> str:
    """The kernels that run the ops of the module at `path`, each once, in order."""
    names = (kernel for where, kernel in kernels if path == WHOLE or inside(where, path))
    return ", ".join(dict.fromkeys(names))


def inside(where: str, path: str) -> bool:
    return where == path or where.startswith(path + ".")
