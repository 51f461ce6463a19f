"""The report on a compilation, and what fills it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from moec.ir.dims import product, show_dim
from moec.report.data import WHOLE, PassLine, PortLine, ReportData

if TYPE_CHECKING:
    import torch

    from moec.ir.graph import Graph, Value
    from moec.passes.core.runner import Step


@dataclass(frozen=True, repr=False)
class Report(ReportData):
    """The data, shown as text."""

    def __str__(self) -> str:
        from moec.report.text import render

        return render(self)

    __repr__ = __str__  # so that `m.report()` at a prompt shows it


def describe_graph(graph: Graph, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of a Report that a graph and its weights answer: sizes, ports, parameters.

    Parameters that share storage (tied embeddings) count once.
    """
    bytes_by_dtype: dict[str, int] = {}
    parameters = 0
    seen: set[tuple[int, int]] = set()
    dtypes = {param.name: param.dtype for param in graph.params}
    # What compressed weights stand for are the parameters, not what stores them.
    stacks = [op for op in graph.ops if op.name == "moe.decompress"]
    compressed = {value.name for op in stacks for value in op.inputs}
    parameters += sum(cast(int, product(op.outputs[0].shape)) for op in stacks)
    for name, dtype in dtypes.items():
        tensor = weights.get(name)
        if tensor is None:
            continue
        place = (tensor.data_ptr(), tensor.numel())
        if place[0] and place in seen:
            continue
        seen.add(place)
        parameters += tensor.numel() if name not in compressed else 0
        size = tensor.numel() * tensor.element_size()
        bytes_by_dtype[dtype] = bytes_by_dtype.get(dtype, 0) + size
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
    return PortLine(value.name, value.dtype, tuple(show_dim(dim) for dim in value.shape))


def pass_lines(steps: Iterable[Step]) -> tuple[PassLine, ...]:
    return tuple(
        PassLine(s.name, s.stage.name, s.rewrites, len(s.program.graph.ops), s.seconds)
        for s in steps
    )


def kernels_of(path: str, kernels: Sequence[tuple[str, str]]) -> str:
    """The kernels that run what stands at `path` in the model, each once, in order."""
    found = (kernel for where, kernel in kernels if path == WHOLE or inside(where, path))
    return ", ".join(dict.fromkeys(found))


def inside(where: str, path: str) -> bool:
    return where == path or where.startswith(path + ".")
