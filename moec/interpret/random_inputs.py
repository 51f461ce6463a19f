"""Random inputs for a captured program, derived from its example inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moec.dtypes import FLOATS
from moec.errors import InputError
from moec.ir.graph import Graph, Program, Value

Inputs = Sequence[torch.Tensor]

_PASS_ON = (
    "aten.alias.default",
    "aten.reshape.default",
    "aten.clone.default",
    "aten._to_copy.default",
)


def random_like(
    program: Program, example: Inputs, generator: torch.Generator
) -> list[torch.Tensor]:
    """Inputs of the example's sizes: random floats, and random ids within their table.

    Ids whose row is all zero (padding) are left out: all router scores of such a token are equal,
    and torch does not define which of equal scores its top-k chooses.

    Integers that are no table ids (masks, positions) are those of the example; states have their
    initial contents.
    """
    inputs: list[torch.Tensor] = []
    for value, tensor in zip(program.graph.inputs, example, strict=False):
        rows = table_rows(program.graph, value)
        if value.dtype in FLOATS:
            inputs.append(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
        elif rows:
            ids = _nonzero_rows(program, value, rows)
            index = torch.randint(len(ids), tensor.shape, generator=generator)
            inputs.append(ids[index].to(tensor.dtype))
        else:
            inputs.append(tensor)
    return inputs + [program.weights[state.before.name] for state in program.graph.states]


def _nonzero_rows(program: Program, value: Value, rows: int) -> torch.Tensor:
    """The ids below `rows` whose row in the table is not all zero; all ids if every row is zero."""
    table = next(iter(_tables(program.graph, value)), None)
    weight = None if table is None else program.weights.get(table.name)
    ids = torch.arange(rows)
    if weight is not None:
        nonzero = weight[:rows, :1].ne(0).any(-1)  # of most rows one element is enough
        rest = nonzero.logical_not().nonzero()[:, 0]
        nonzero[rest] = weight[rest].ne(0).any(-1)
        ids = ids[nonzero] if nonzero.any() else ids
    return ids


def _tables(graph: Graph, value: Value) -> Iterator[Value]:
    for op in graph.readers.get(value, ()):
        if op.name == "aten.embedding.default" and op.inputs[1] is value:
            yield op.inputs[0]
        elif op.name in _PASS_ON:
            yield from _tables(graph, op.outputs[0])


def table_rows(graph: Graph, value: Value) -> int:
    """The number of rows of the tables in which an input is looked up; 0 if there is none."""
    sizes = [table.shape[0] for table in _tables(graph, value)]
    return min((size for size in sizes if isinstance(size, int)), default=0)


def random_cases(
    program: Program, example: Inputs, *, count: int = 2, seed: int = 0
) -> list[list[torch.Tensor]]:
    """Random inputs for a captured program, derived from its example inputs.

    Raises InputError where there are none.
    """
    if not example and program.graph.inputs:
        raise InputError(
            "the model was captured without example inputs: give example inputs to bisect it"
        )
    generator = torch.Generator().manual_seed(seed)
    return [random_like(program, example, generator) for _ in range(count)]
