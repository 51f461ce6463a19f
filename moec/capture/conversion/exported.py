"""Converts a torch.export program to a Graph in stage ATEN.

A node that computes a SymInt becomes an expression over named sizes, never an op. Guards and
assertions of the export are dropped here; the sizes that they allow are kept as bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)

from moec.capture.conversion.dropped_nodes import dropped
from moec.capture.conversion.index_requirements import with_written
from moec.capture.conversion.node_converter import Converter, relative_path
from moec.errors import CaptureError
from moec.ir.graph import Graph, Op, Program, State, Value
from moec.ir.interpret.outputs import SLOT, Structure, of_leaves
from moec.ir.sizes.dims import Bounds, symbols


def to_program(
    exported: ExportedProgram,
    *,
    rename: Mapping[str, str] | None = None,
    bounds: Mapping[str, Bounds] | None = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    prefix: str = "",
) -> Program:
    """The graph and weights of a decomposed export.

    `rename` maps torch's symbols to names of the IR; `bounds` overrides the bounds of the export.
    Weights keep their names, without `prefix`, and share memory with the export. Raises
    CaptureError, naming the module path, for what a graph cannot represent.
    """
    rename = rename or {}
    converter = Converter(rename, exported.graph_module, prefix)
    signature = exported.graph_signature
    holders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    mutated = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}
    inputs: list[Value] = []
    params: dict[str, Value] = {}
    states: dict[str, Value] = {}
    weights: dict[str, torch.Tensor] = {}
    shared: dict[tuple[Any, ...], Value] = {}
    for spec, node in zip(signature.input_specs, holders, strict=True):
        if not isinstance(spec.arg, TensorArgument):
            converter.values[node] = getattr(spec.arg, "value", None)
            if isinstance(node.meta.get("val"), torch.SymInt):
                raise CaptureError(
                    f"input {node.name} is a Python number that may vary; pass it as a tensor"
                )
            continue
        tensor = node.meta["val"]
        if spec.kind is InputKind.USER_INPUT:
            index = len(inputs)
            wish = input_names[index] if index < len(input_names) else node.name
            name = converter.fresh(wish)
            value = Value(name, converter.type(tensor, f"input {name}"))
            inputs.append(value)
        else:
            target = cast(str, spec.target)
            data = _weight(exported, spec.kind, target)
            name = relative_path(prefix, target)
            value = Value(converter.fresh(name), converter.type(tensor, name))
            if target in mutated:
                states[target] = value
                weights[value.name] = data
            else:
                key = (data.data_ptr(), data.shape, data.stride(), data.dtype)
                if data.numel() and key in shared:
                    value = shared[key]
                else:
                    shared[key] = params[target] = value
                    weights[value.name] = data
        converter.values[node] = value
    for node in exported.graph.nodes:
        if node.op == "call_function" and not dropped(node):
            converter.node(node)
    outputs, after = _outputs(exported, converter, output_names)
    ordered = tuple(State(states[name], after[name]) for name in states)
    used = {name for value in (*inputs, *states.values()) for name in _symbols(value)}
    ranges = _ranges(exported, rename)
    limits = {name: (bounds or {}).get(name, ranges.get(name, Bounds())) for name in sorted(used)}
    graph = Graph(
        (*inputs, *states.values()),
        tuple(params.values()),
        tuple(converter.ops),
        outputs,
        ordered,
        limits,
    )
    return Program(with_written(graph, weights, converter.written), weights)


def _ranges(exported: ExportedProgram, rename: Mapping[str, str]) -> dict[str, Bounds]:
    """The bounds of the export by the IR's names of sizes; several symbols may have one name."""
    ranges: dict[str, Bounds] = {}
    for symbol, limits in exported.range_constraints.items():
        name = rename.get(str(symbol), str(symbol))
        declared = Bounds(_integer_limit(limits.lower) or 0, _integer_limit(limits.upper))
        ranges[name] = declared.intersect(ranges.get(name, Bounds()))
    return ranges


def _symbols(value: Value) -> set[str]:
    return {name for dim in value.shape for name in symbols(dim)}


def _integer_limit(limit: Any) -> int | None:
    if not getattr(limit, "is_Integer", isinstance(limit, int)):
        return None
    return None if int(limit) >= 2**62 else int(limit)


def _weight(exported: ExportedProgram, kind: InputKind, target: str) -> torch.Tensor:
    stores: list[Mapping[str, Any]] = [exported.state_dict, exported.constants]
    for store in stores if kind is not InputKind.CONSTANT_TENSOR else reversed(stores):
        if target in store:
            return cast(torch.Tensor, store[target]).detach()
    raise CaptureError(f"the export names the weight {target} but does not hold it")


def structure_of(exported: ExportedProgram) -> Structure:
    """The structure of the program's result: slots for tensors, and constants (None, numbers).

    Raises CaptureError for a number that depends on sizes or data.
    """
    leaves: list[Any] = []
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue
        if isinstance(spec.arg, TensorArgument):
            leaves.append(SLOT)
        elif isinstance(spec.arg, ConstantArgument):
            leaves.append(spec.arg.value)
        else:
            raise CaptureError(
                f"output {spec.arg.name} is a Python number that may vary; return it as a tensor"
            )
    return of_leaves(exported.call_spec.out_spec, leaves)


def _outputs(
    exported: ExportedProgram, converter: Converter, names: Sequence[str]
) -> tuple[tuple[Value, ...], dict[str, Value]]:
    """The user's outputs, and the new contents of each buffer and parameter that the model writes.

    Each output passes through an alias op, so that it has its own name even where it is an input or
    a weight that is returned unchanged.
    """
    (node,) = [n for n in exported.graph.nodes if n.op == "output"]
    results = converter.argument(node.args[0])
    outputs: list[Value] = []
    after: dict[str, Value] = {}
    for spec, result in zip(exported.graph_signature.output_specs, results, strict=True):
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            written = next(v for n, v in converter.values.items() if n.name == spec.target)
            raise CaptureError(
                f"the model writes into its input {written.name}; copy the input first, or make "
                "it a buffer"
            )
        if not isinstance(result, Value):
            continue  # a constant, which is part of the result's structure
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            after[cast(str, spec.target)] = result
            continue
        index = len(outputs)
        stem = names[index] if index < len(names) else f"output_{index}"
        alias = Value(converter.fresh(stem), result.type)
        converter.ops.append(Op("aten.alias.default", (result,), (alias,)))
        outputs.append(alias)
    return tuple(outputs), after
