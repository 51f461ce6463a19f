"""An input of the model becomes a constant, and leaves the signature.

    graph main(x: f32[B, 8], task: i64[B])  ->  graph main(x: f32[B, 8])
                                                  task = moec.bound() <value=(3), shape=(B), …>

The op keeps the constant from being taken for one of the model's weights while blocks are
recognised; the pass that asked for it folds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from moec.errors import UsageError
from moec.interpret.random_inputs import table_rows
from moec.ir.aten import TORCH_DTYPES
from moec.ir.dims import Dim, symbols
from moec.ir.graph import DType, Op, Program, Value
from moec.ops.bound import place
from moec.passes.core.options import Given


def bind(program: Program, given: Given, who: str) -> Program:
    """The program whose inputs `given` are constants; those bound before stay as they are.

    Raises UsageError for an input that it has not, a value that the input cannot have, and where
    the size of another input could not be known any more.
    """
    graph = program.graph
    before = {state.before for state in graph.states}
    own = {value.name: value for value in graph.inputs if value not in before}
    bound = {value.name for value in seeds(program)}
    taken = {}
    for name, value in given.items():
        if name in own:
            taken[own[name]] = _stands_for(program, own[name], value, who)
        elif name not in bound:
            raise UsageError(
                f"{who}: the model has no input {name}; it has {', '.join(own) or 'none'}"
            )
    left = tuple(value for value in graph.inputs if value not in taken)
    _check_sizes(taken, left, who)
    ops = [
        Op(
            "moec.bound",
            (),
            (value,),
            {
                "value": tuple(tensor.flatten().tolist()),
                "shape": value.shape,
                "dtype": DType(value.dtype),
            },
        )
        for value, tensor in taken.items()
    ]
    return replace(program, graph=replace(graph, inputs=left, ops=(*ops, *graph.ops)))


def seeds(program: Program) -> dict[Value, torch.Tensor]:
    """What stands for each bound input of a program (see token_invariant.py)."""
    return {op.outputs[0]: place(op) for op in program.graph.ops if op.name == "moec.bound"}


def _stands_for(program: Program, value: Value, given: Any, who: str) -> torch.Tensor:
    """The one place [1, …] of an input that stands for all."""
    shape = tuple(1 if symbols(dim) else int(dim) for dim in value.shape)
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{who}: {value.name} is {given!r}: give numbers") from None
    whole = value.dtype[0] in "iu"
    if tensor.is_floating_point() and (whole or value.dtype == "bool"):
        raise UsageError(
            f"{who}: {value.name} is {_show(tensor)}, and the input takes whole numbers "
            f"({value.type})"
        )
    if tensor.numel() not in (1, torch.Size(shape).numel()):
        raise UsageError(
            f"{who}: {value.name} is given {tensor.numel()} numbers, and the input is {value.type}"
        )
    rows = table_rows(program.graph, value)
    if rows and not (0 <= int(tensor.min()) and int(tensor.max()) < rows):
        raise UsageError(
            f"{who}: {value.name} is {_show(tensor)}, and looks up one of {rows} rows: give 0 to "
            f"{rows - 1}"
        )
    made = tensor.to(TORCH_DTYPES[value.dtype])
    return made.reshape(shape) if made.numel() > 1 else made.reshape(()).repeat(shape)


def _show(tensor: torch.Tensor) -> str:
    return ":".join(map(str, tensor.flatten().tolist()))


def _check_sizes(taken: Iterable[Value], left: Iterable[Value], who: str) -> None:
    known = {name for value in left for dim in value.shape for name in _alone(dim)}
    for value in taken:
        for name in {name for dim in value.shape for name in symbols(dim)} - known:
            raise UsageError(
                f"{who}: {value.name} is the only input that tells the size {name}: give its axis "
                "a number or the name of another input's axis (--shapes, dynamic_shapes)"
            )


def _alone(dim: Dim) -> set[str]:
    return {str(dim)} if symbols(dim) == {str(dim)} else set()
