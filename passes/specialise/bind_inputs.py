"""An input of the model becomes a constant, and leaves the signature.

    graph main(x: f32[B, 8], task: i64[B])  ->  graph main(x: f32[B, 8])
                                                  task = moec.bound() <value=(3), shape=(B), …>

The constant is an op, so that recognisers do not take it for a weight of the model; the pass that
bound the input folds it later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from moec.errors import UsageError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import DType, Op, Program, Value
from moec.ir.ops.sizes import periodic_constant
from moec.ir.sizes.dims import Dim, symbols
from moec.oracle.table_ids import table_rows
from moec.passes.core.options import Given


def bind(program: Program, values: Given, where: str) -> Program:
    """The program with the inputs named in `values` bound to them. Bound inputs stay bound.

    Raises UsageError for an input that the program lacks, for a value of the wrong type, range or
    shape, and for an input that is the only one to determine a size.
    """
    graph = program.graph
    before = {state.before for state in graph.states}
    inputs = {value.name: value for value in graph.inputs if value not in before}
    bound = {value.name for value in seeds(program)}
    constants = {}
    for name, value in values.items():
        if name in inputs:
            constants[inputs[name]] = _constant(program, inputs[name], value, where)
        elif name not in bound:
            raise UsageError(
                f"{where}: the model has no input {name}; it has {', '.join(inputs) or 'none'}"
            )
    left = tuple(value for value in graph.inputs if value not in constants)
    _check_sizes(constants, left, where)
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
        for value, tensor in constants.items()
    ]
    return replace(program, graph=replace(graph, inputs=left, ops=(*ops, *graph.ops)))


def seeds(program: Program) -> dict[Value, torch.Tensor]:
    """The constant of each bound input of a program (see token_invariant.py)."""
    return {
        op.outputs[0]: periodic_constant(op) for op in program.graph.ops if op.name == "moec.bound"
    }


def _constant(program: Program, value: Value, number: Any, where: str) -> torch.Tensor:
    """The constant of an input, with 1 for every axis of a named size, along which it repeats."""
    shape = tuple(1 if symbols(dim) else int(dim) for dim in value.shape)
    try:
        tensor = torch.as_tensor(number)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{where}: {value.name} is {number!r}: give numbers") from None
    integral = value.dtype[0] in "iu"
    if tensor.is_floating_point() and (integral or value.dtype == "bool"):
        raise UsageError(
            f"{where}: {value.name} is {_show(tensor)}, and the input takes whole numbers "
            f"({value.type})"
        )
    if tensor.numel() not in (1, torch.Size(shape).numel()):
        raise UsageError(
            f"{where}: {value.name} is given {tensor.numel()} numbers, and the input is "
            f"{value.type}: give one number, or one for each element"
        )
    rows = table_rows(program.graph, value)
    if rows and not (0 <= int(tensor.min()) and int(tensor.max()) < rows):
        raise UsageError(
            f"{where}: {value.name} is {_show(tensor)}, and looks up one of {rows} rows: give 0 to "
            f"{rows - 1}"
        )
    converted = tensor.to(TORCH_DTYPES[value.dtype])
    return (
        converted.reshape(shape) if converted.numel() > 1 else converted.reshape(()).repeat(shape)
    )


def _show(tensor: torch.Tensor) -> str:
    return ":".join(map(str, tensor.flatten().tolist()))


def _check_sizes(constants: Iterable[Value], left: Iterable[Value], where: str) -> None:
    sizes = {name for value in left for dim in value.shape for name in _single_size(dim)}
    for value in constants:
        for name in {name for dim in value.shape for name in symbols(dim)} - sizes:
            raise UsageError(
                f"{where}: {value.name} is the only input that determines the size {name}: "
                "give its axis a number or the name of another input's axis (--shapes, "
                "dynamic_shapes)"
            )


def _single_size(dim: Dim) -> set[str]:
    return {str(dim)} if symbols(dim) == {str(dim)} else set()
