"""The report on a compilation, and functions that fill its fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.files.printable import preformatted
from moec.report.data import WHOLE, PassLine, PortLine, ReportData

if TYPE_CHECKING:
    import torch

    from moec.ir.graph import Graph, Value
    from moec.passes.core.runner import PassResult


@dataclass(frozen=True, repr=False)
class Report(ReportData):
    """The data of a report, printed as text."""

    def __str__(self) -> str:
        from moec.report.text import render

        return render(self)

    @property
    def brief(self) -> str:
        """Blocks, verification, size and time, a line each; approximations and notes."""
        from moec.report.brief import brief

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
