"""One expert as a graph, which `moec::experts` runs for the rows of each expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch
from torch import nn
from torch.export import Dim

from moec.capture.behaviour.layer.description import Description
from moec.capture.behaviour.layer.feed_forward import feed_forward
from moec.capture.behaviour.layer.parts import tensor
from moec.capture.conversion.exported import to_program
from moec.capture.decomposition import decompose
from moec.errors import NoMatch
from moec.ir.graph import Graph
from moec.ir.text import print_graph

OneExpert = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def expert_tensors(expert: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that an expert module reads: its parameters and its floating-point buffers."""
    buffers = {n: b for n, b in expert.named_buffers() if b.is_floating_point()}
    return {**dict(expert.named_parameters()), **buffers}


def stacks(module: nn.Module, description: Description) -> list[torch.Tensor]:
    """The experts' tensors, each stacked over the experts to [E, ..]."""
    if description.body is not None:
        return [tensor(module, name) for name in description.experts]
    experts = [expert_tensors(module.get_submodule(name)) for name in description.experts]
    return [torch.stack([expert[name] for expert in experts]) for name in experts[0]]


def expert_body(module: nn.Module, description: Description, width: int) -> str:
    """The text of the graph body(x[R, D]; one slice of each stack) -> y[R, D].

    Raises NoMatch where an expert cannot be traced by itself.
    """
    one = _one_expert(module, description)
    slices = [stack.detach()[0] for stack in stacks(module, description)]
    rows = torch.empty(5, width, dtype=slices[0].dtype if slices else torch.float32)
    try:
        with torch.no_grad():
            exported = torch.export.export(
                _Body(one), (rows, slices), dynamic_shapes=({0: Dim.AUTO}, [None] * len(slices)),
                strict=False,
            )  # fmt: skip
        rename = {str(name): "R" for name in exported.range_constraints}
        graph = to_program(decompose(exported), rename=rename, output_names=("y",)).graph
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise NoMatch(
            f"{description.experts[0]}, one of its experts, cannot be traced by itself: "
            f"{type(error).__name__}: {first}"
        ) from error
    if graph.params:
        raise NoMatch(
            f"{description.experts[0]} reads {graph.params[0].name}, which is not its own"
        )
    limits = list(exported.range_constraints.values())
    if _reads_rows(graph) or any(limit.lower > 2 or limit.upper < 2**31 for limit in limits):
        raise NoMatch(
            f"{description.experts[0]} reads how many rows it has, and an expert must compute each "
            "row by itself"
        )
    return print_graph(Graph(graph.inputs[:1], graph.inputs[1:], graph.ops, graph.outputs,
                             name="body"))  # fmt: skip


def _reads_rows(graph: Graph) -> bool:
    """Whether the number of rows is fixed, or a number in the graph beside its shapes."""
    (rows, *_) = graph.inputs[0].shape
    attributes = [(name, a) for op in graph.ops for name, a in op.attrs.items()]
    numbers = [a for name, a in attributes if name not in _SHAPES and isinstance(a, sympy.Expr)]
    return isinstance(rows, int) or any(number.free_symbols for number in numbers)


_SHAPES = frozenset({"size", "shape", "repeats"})


def _one_expert(module: nn.Module, description: Description) -> OneExpert:
    body = description.body

    def of_stacks(rows: torch.Tensor, slices: list[torch.Tensor]) -> torch.Tensor:
        assert body is not None
        return feed_forward(body, rows, slices)

    def of_module(rows: torch.Tensor, slices: list[torch.Tensor]) -> torch.Tensor:
        expert = module.get_submodule(description.experts[0])
        named = dict(zip(expert_tensors(expert), slices, strict=True))
        result = torch.func.functional_call(expert, named, (rows,))
        assert isinstance(result, torch.Tensor)
        return result

    return of_module if body is None else of_stacks


class _Body(nn.Module):
    def __init__(self, one: OneExpert) -> None:
        super().__init__()
        # in a list, so that the tensors that it reads are not captured as parameters
        self.one = [one]

    def forward(self, rows: torch.Tensor, slices: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.one[0](rows, list(slices))
