"""Run a graph of any stage in eager PyTorch, op by op: the meaning that passes must keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.errors import IRError
from moec.ir import aten
from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import Reference
from moec.ir.ops import OPS
from moec.ir.sizes.dims import bind_shape, show_bounds, symbols
from moec.ir.sizes.thresholds import violated


def evaluate(
    graph: Graph, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...]:
    """`graph.results` for `inputs` (states' contents last) and `weights` by param name.

    Raises IRError where a tensor does not fit its type, or a size its bounds.
    """
    check_bounds(graph, inputs)
    return evaluate_anywhere(graph, inputs, weights or {})


def bind_checked(
    graph: Graph,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    sizes: dict[str, int],
) -> dict[Value, torch.Tensor]:
    """As `bind`, for what `evaluate` takes, and raises what it raises."""
    check_bounds(graph, inputs)
    return bind(graph, [*inputs, *(weights[param.name] for param in graph.params)], sizes)


def evaluate_anywhere(
    graph: Graph, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """As `evaluate`, also outside of the bounds, for a capture that looks for them."""
    return run_graph(graph, [*inputs, *(weights[param.name] for param in graph.params)])


def check_bounds(graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Raises IRError where an input does not fit its type, or a size its bounds."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        _learn(graph.name, value, tensor, sizes)
    size = violated(graph.bounds, sizes)
    if size is not None:
        limits = graph.bounds[size]
        line = f" ({limits.line})" if limits.line else ""
        sizes_text = ", ".join(f"{name} = {sizes[name]}" for name in sorted(sizes))
        raise IRError(
            f"{graph.name}: {size} is outside of {show_bounds(limits)} where {sizes_text}{line}"
        )


def run_graph(
    graph: Graph,
    tensors: Sequence[torch.Tensor],
    env: Mapping[str, int] | None = None,
    meanings: Mapping[str, Reference] | None = None,
) -> tuple[torch.Tensor, ...]:
    """As `evaluate`, with the params' tensors after the inputs'.

    `env` binds named sizes, `meanings` overrides the meanings of some ops.
    """
    sizes = dict(env or {})
    values = bind(graph, tensors, sizes)
    run_part(graph, range(len(graph.ops)), values, sizes, meanings)
    return tuple(values[v] for v in graph.results)


def bind(
    graph: Graph, tensors: Sequence[torch.Tensor], sizes: dict[str, int]
) -> dict[Value, torch.Tensor]:
    """The tensors of the inputs and params; the sizes that their shapes name are added."""
    values = dict(zip((*graph.inputs, *graph.params), tensors, strict=True))
    for value, tensor in values.items():
        _learn(graph.name, value, tensor, sizes)
    return values


def run_part(
    graph: Graph,
    part: range,
    values: dict[Value, torch.Tensor],
    sizes: dict[str, int],
    meanings: Mapping[str, Reference] | None = None,
) -> None:
    """The ops of `graph` with the numbers `part`: what they compute is added to `values` and
    `sizes`, and what no later op reads is dropped."""
    last = graph.last_reads
    for index in part:
        op = graph.ops[index]
        results = run_op(op, [values[v] for v in op.inputs], sizes, meanings)
        for value, tensor in zip(op.outputs, results, strict=True):
            _learn(op, value, tensor, sizes)
            values[value] = tensor
        if op.name == "moec.size":
            sizes[str(op.attrs["name"])] = int(results[0])
        for value in last.get(index, ()):
            values.pop(value, None)


def run_op(
    op: Op,
    tensors: Sequence[torch.Tensor],
    sizes: Mapping[str, int],
    meanings: Mapping[str, Reference] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The outputs of one op."""
    reference = (meanings or {}).get(op.name)
    if reference is None and op.name in OPS:
        reference = OPS[op.name].reference
    if reference is None:
        return aten.call(op, tensors, sizes)
    attrs: dict[str, Any] = {
        name: aten.resolve_attr(value, tensors, sizes) for name, value in op.attrs.items()
    }

    def run(body: Graph, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return run_graph(
            body, arguments, {k: v for k, v in sizes.items() if k not in row_sizes(body)}
        )

    result = reference(op, tensors, attrs, run)
    return result if isinstance(result, tuple) else (result,)


def row_sizes(body: Graph) -> set[str]:
    """The named sizes that a body's inputs bind: its number of rows."""
    return {name for value in body.inputs for dim in value.shape for name in symbols(dim)}


def _learn(where: object, value: Value, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise IRError(f"{where}: {value.name} is {type(tensor).__name__}, not a tensor")
    if aten.IR_DTYPES.get(tensor.dtype) != value.dtype:
        raise IRError(f"{where}: {value.name} is {tensor.dtype}, expected {value.type}")
    try:
        bind_shape(value.shape, tuple(tensor.shape), sizes)
    except IRError as error:
        raise IRError(f"{where}: {value.name}: {error}") from None
