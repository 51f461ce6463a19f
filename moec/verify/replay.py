"""A graph with the choices that code made in the place of its own.

Rounding decides between two experts with nearly equal scores, and all that follows depends on it.
With the same choices two right results differ by roundings alone, in every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moec.errors import IRError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.interpret.run_in_float32 import all_in_float32
from moec.ir.sizes.dims import bind_shape, evaluate_dim
from moec.oracle.agree import with_states
from moec.oracle.cases import Case

Tensors = Mapping[str, torch.Tensor]


def choices(graph: Graph, written: Tensors) -> dict[str, torch.Tensor]:
    """Of what kernels wrote, the results of ops that choose: that make integers from floats."""
    return {v.name: written[v.name] for op in graph.ops for v in _chosen(op, graph, written)}


def _chosen(op: Op, graph: Graph, written: Tensors) -> tuple[Value, ...]:
    floats = any(value.dtype in ("f64", "f32", "bf16", "f16") for value in op.inputs)
    types = [TORCH_DTYPES[value.dtype] for value in op.outputs]
    if not floats or all(dtype.is_floating_point or dtype.is_complex for dtype in types):
        return ()
    read = tuple(v for v in op.outputs if v in graph.readers or v in graph.results)
    return read if all(value.name in written for value in read) else ()


def replayed(
    program: Program, cases: Sequence[Case], chosen: Sequence[Tensors]
) -> list[tuple[torch.Tensor, ...]]:
    """The results of each case in float32."""
    inputs = [with_states(program, case) for case in cases]
    pairs = zip(inputs, chosen, strict=True)
    return all_in_float32(program, inputs, choices=[_values(program.graph, *p) for p in pairs])


def replayed_as_is(program: Program, case: Case, chosen: Tensors) -> tuple[torch.Tensor, ...]:
    """The results in the dtypes of the graph."""
    inputs = with_states(program, case)
    weights = [program.weights[param.name] for param in program.graph.params]
    graph, fixed = program.graph, _values(program.graph, inputs, chosen)
    precomputed = {v: fixed[v.name] for v in graph.values() if v.name in fixed}
    with torch.no_grad():
        return run_graph(graph, [*inputs, *weights], precomputed=precomputed)


def _values(
    graph: Graph, inputs: Sequence[torch.Tensor], chosen: Tensors
) -> dict[str, torch.Tensor]:
    """The chosen values in the shapes and dtypes of the graph. The graph decides itself where a
    shape depends on data."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        bind_shape(value.shape, tuple(tensor.shape), sizes)
    result: dict[str, torch.Tensor] = {}
    for op in graph.ops:
        values = _chosen(op, graph, chosen)
        try:
            shapes = [[evaluate_dim(dim, sizes) for dim in value.shape] for value in values]
        except IRError:
            continue
        for value, shape in zip(values, shapes, strict=True):
            dtype = TORCH_DTYPES[value.dtype]
            result[value.name] = chosen[value.name].reshape(shape).to(dtype)
        unread = [v.name for v in op.outputs if values and v not in values]
        result |= dict.fromkeys(unread, torch.zeros(0))
    return result
