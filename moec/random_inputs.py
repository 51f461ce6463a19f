"""Random inputs for a captured program, made from the inputs that it was captured with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.errors import InputError
from moec.ir import FLOATS, Graph, Program, Value

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
    """Inputs of the example's sizes: floats at random, ids at random within their table.

    Whole numbers that look up nothing (masks, positions) stay as in the example; states hold
    what they start with.
    """
    made: list[torch.Tensor] = []
    for value, tensor in zip(program.graph.inputs, example, strict=False):
        rows = table_rows(program.graph, value)
        if value.dtype in FLOATS:
            made.append(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
        elif rows:
            made.append(torch.randint(rows, tensor.shape, generator=generator, dtype=tensor.dtype))
        else:
            made.append(tensor)
    return made + [program.weights[state.before.name] for state in program.graph.states]


def table_rows(graph: Graph, value: Value) -> int:
    """How many rows the tables have in which an input looks up; 0 where it looks up none."""
    rows: list[int] = []
    for op in graph.readers.get(value, ()):
        if op.name == "aten.embedding.default" and op.inputs[1] is value:
            size = op.inputs[0].shape[0]
            rows += [size] if isinstance(size, int) else []
        elif op.name in _PASS_ON:
            rows += [r] if (r := table_rows(graph, op.outputs[0])) else []
    return min(rows, default=0)


def random_cases(
    program: Program, example: Inputs, *, count: int = 2, seed: int = 0
) -> list[list[torch.Tensor]]:
    """Random inputs for a captured program, made from the inputs that it was captured with.

    Raises InputError where there are none.
    """
    if not example and program.graph.inputs:
        raise InputError("the model was captured without example inputs; give some to bisect it")
    generator = torch.Generator().manual_seed(seed)
    return [random_like(program, example, generator) for _ in range(count)]
