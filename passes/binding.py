"""An input of the model becomes a constant, and leaves the signature.

    graph main(x: f32[B, 8], task: i64[B])    graph main(x: f32[B, 8]; task_2: i64[1])
                                        ->      task = aten.expand.default(task_2) <size=(B)>
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from moec.aten import TORCH_DTYPES
from moec.errors import UsageError
from moec.ir import Op, Program, TensorType, Value
from moec.passes.options import Given
from moec.passes.rewrite import Builder
from moec.random_inputs import table_rows
from moec.sizes import Dim, symbols


def bind(program: Program, given: Given, who: str) -> Program:
    """The program whose inputs `given` are constants; those bound before stay as they are.

    Raises UsageError for an input that it has not, a value that the input cannot have, and where
    the size of another input could not be known any more.
    """
    graph = program.graph
    before = {state.before for state in graph.states}
    own = {value.name: value for value in graph.inputs if value not in before}
    bound = _bound(program)
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
    names = Builder(graph)
    params, ops, weights = list(graph.params), list(graph.ops), dict(program.weights)
    for value, tensor in taken.items():
        param = value
        if any(symbols(dim) for dim in value.shape):
            type = TensorType(value.dtype, tuple(tensor.shape))
            param = Value(names.fresh(value.name), type)
            ops.insert(0, Op("aten.expand.default", (param,), (value,), {"size": value.shape}))
        params.append(param)
        weights[param.name] = tensor
    return Program(replace(graph, inputs=left, params=tuple(params), ops=tuple(ops)), weights)


def seeds(program: Program, given: Given) -> dict[Value, torch.Tensor]:
    """What stands for each bound input of a program (see `moec.passes.uniform`)."""
    bound = _bound(program)
    return {bound[name][0]: bound[name][1] for name in given if name in bound}


def _bound(program: Program) -> dict[str, tuple[Value, torch.Tensor]]:
    """The values that `bind` makes, and others like them, by name."""
    graph = program.graph
    found = {p.name: (p, program.weights[p.name]) for p in graph.params}
    for op in graph.ops:
        if op.name == "aten.expand.default" and op.inputs[0].name in found and not op.origin:
            found[op.outputs[0].name] = (op.outputs[0], found[op.inputs[0].name][1])
    return found


def _stands_for(program: Program, value: Value, given: Any, who: str) -> torch.Tensor:
    """The one place [1, …] of an input that stands for all."""
    shape = tuple(1 if symbols(dim) else int(dim) for dim in value.shape)
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{who}: {value.name} is {given!r}: give numbers") from None
    whole = value.dtype[0] in "iu"
    if tensor.is_floating_point() and (whole or value.dtype == "bool"):
        raise UsageError(f"{who}: {value.name} is {_show(tensor)}, and the input {value.type}")
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
                f"{who}: {value.name} is the only input that tells the size {name}: capture the "
                "model with a fixed size (dynamic_shapes), or bind another input"
            )


def _alone(dim: Dim) -> set[str]:
    return {str(dim)} if symbols(dim) == {str(dim)} else set()
