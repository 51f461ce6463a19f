"""A graph of ATen operators as one of torch.fx, which Dynamo traces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from types import MethodType
from typing import Any

import sympy
import torch
from torch import fx, nn

from moec.errors import NoMatch
from moec.ir import aten
from moec.ir.graph import Attr, Graph, Op, Ref, Value
from moec.ir.index_uses import REQUIRE
from moec.ir.sizes.dims import Dim

Sizes = Mapping[str, Any]
"""Named sizes as nodes of a graph."""


def torch_function(graph: Graph) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The graph as a function of None, its inputs and params that returns a tuple of its outputs.

    Indices need no checks of their own: torch's operators have them. Raises NoMatch for an
    operator or a size that torch.fx cannot express.
    """
    nodes = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(nodes)
    values: dict[Value, Any] = {}
    sizes: dict[str, Any] = {}

    def bind(value: Value, proxy: Any) -> None:
        values[value] = proxy
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, sympy.Symbol) and dim.name not in sizes:
                sizes[dim.name] = proxy.size(axis)

    for number, value in enumerate((*graph.inputs, *graph.params)):
        bind(value, tracer.proxy(nodes.placeholder(f"arg{number}")))
    for op in graph.ops:
        for value, proxy in zip(op.outputs, _results(tracer, op, values, sizes), strict=True):
            bind(value, proxy)
    nodes.output(tuple(values[value].node for value in graph.outputs))
    nodes.eliminate_dead_code()
    # Not the module itself, which Dynamo would name as the origin of each operator.
    return type(fx.GraphModule(torch.nn.Module(), nodes)).forward


def _results(
    tracer: fx.proxy.TracerBase, op: Op, values: Mapping[Value, Any], sizes: Sizes
) -> list[Any]:
    inputs = [values[value] for value in op.inputs]
    if op.name == REQUIRE:
        return inputs
    if not op.name.startswith("aten."):
        raise NoMatch(f"{op.line or op.name} is no operator of PyTorch's")
    numbers: list[Any] = []

    def by_reference(attr: Attr) -> Attr:
        """An attribute with sizes as further inputs of the operator."""
        if isinstance(attr, tuple):
            return tuple(map(by_reference, attr))
        if isinstance(attr, sympy.Expr):
            numbers.append(_size(attr, sizes))
            return Ref(len(inputs) + len(numbers) - 1)
        return attr

    attrs = {name: by_reference(attr) for name, attr in op.attrs.items()}
    sized = Op(op.name, (*op.inputs, *op.inputs[:1] * len(numbers)), op.outputs, attrs)
    args, kwargs = aten.arguments(sized, [*inputs, *numbers], {})
    result: Any = tracer.create_proxy("call_function", aten.overload(op.name), tuple(args), kwargs)
    return [result] if len(op.outputs) == 1 else [result[i] for i in range(len(op.outputs))]


def _size(dim: Dim, sizes: Sizes) -> Any:
    match dim:
        case int() | sympy.Integer():
            return int(dim)
        case sympy.Symbol():
            return sizes[dim.name]
        case sympy.Add() | sympy.Mul() if all(part.is_integer for part in dim.args):
            function = operator.add if dim.is_Add else operator.mul
            return reduce(function, [_size(part, sizes) for part in dim.args])
        case sympy.Max() | sympy.Min():
            function = torch.sym_max if dim.func is sympy.Max else torch.sym_min
            return reduce(function, [_size(part, sizes) for part in dim.args])
        case sympy.floor():
            above, below = dim.args[0].as_numer_denom()
            return _size(above, sizes) // _size(below, sizes)
    raise NoMatch(f"a size is {dim}, which is computed in Python")


FORWARDS = "moec_forwards"
"""The attribute of a module that holds, by name of the replacement, the forward that the instance
had beside that of its class, such as that of accelerate; None if it had none."""


def replace_forward(module: nn.Module, name: str, forward: Callable[..., Any]) -> None:
    """Makes `forward` the module's method, also in copies of the module; once for each `name`."""
    previous = module.__dict__.setdefault(FORWARDS, {})
    if name not in previous:
        previous[name] = module.__dict__.get("forward")
        module.forward = MethodType(forward, module)


def previous_forward(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls the forward that the module had before the replacement `name`."""
    previous = module.__dict__[FORWARDS][name]
    if previous is None:
        return type(module).forward(module, *args, **kwargs)
    return previous(*args, **kwargs)


def restore_forward(module: nn.Module, name: str, forward: Callable[..., Any]) -> None:
    """Takes back the replacement `name` by `forward`, unless another came later."""
    replacement = module.__dict__.get("forward")
    if getattr(replacement, "__func__", None) is not forward:
        return
    previous = module.__dict__[FORWARDS].pop(name)
    if previous is None:
        del module.forward
    else:
        module.forward = previous
