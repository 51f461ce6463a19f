"""Runs models in float32 in place of 16-bit floats, to exclude rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moec.interpret.evaluate import (
    bind_checked,
    evaluate,
    evaluate_anywhere,
    run_graph,
    run_op,
    run_part,
)
from moec.ir.graph import Graph, Module, Program, Value
from moec.ir.size_expressions import size_expressions
from moec.ir.upcast import widen
from moec.torch_private import TorchDispatchMode, pytree, schema_of

MEANING = 2e-4
"""Equivalent graphs in float32 differ by less than this, relative to the greatest value."""

Tensors = Sequence[torch.Tensor]
_LOW, _WIDE = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)


MOST_CAST = 1 << 28
"""The most weights of a program that are cast to float32 at once, 1 GiB."""


def in_float32(
    program: Program, *, anywhere: bool = False
) -> Callable[[Tensors], tuple[torch.Tensor, ...]]:
    """The program in eager PyTorch with every bf16 and f16 upcast to float32: a function from
    inputs (states' contents last) to outputs and the states' new contents. Weights are cast once,
    or where they are more than `MOST_CAST`, whenever an op reads them. `anywhere` evaluates it
    outside of its bounds too.
    """
    if sum(weight.numel() for weight in program.weights.values()) > MOST_CAST and not anywhere:
        return partial(_with_weights_as_read, program, _wide_graph(program.graph))
    program = widened(Module.of(program)).main
    meaning = evaluate_anywhere if anywhere else evaluate

    def run(inputs: Tensors) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return meaning(program.graph, [wide(tensor) for tensor in inputs], program.weights)

    return run


def _with_weights_as_read(
    program: Program, graph: Graph, inputs: Tensors
) -> tuple[torch.Tensor, ...]:
    sizes: dict[str, int] = {}
    params = set(graph.params)
    tensors = [wide(tensor) for tensor in inputs]
    with torch.no_grad():
        values = bind_checked(replace(graph, params=()), tensors, {}, sizes)
        for number, op in enumerate(graph.ops):
            for value in op.inputs:
                if value in params:
                    values[value] = wide(program.weights[value.name].detach())
            run_part(graph, range(number, number + 1), values, sizes)
            for value in params.intersection(op.inputs):
                values.pop(value, None)
        results = (value for value in graph.results if value in params)
        values |= {value: wide(program.weights[value.name]) for value in results}
        return tuple(values[value] for value in graph.results)


def _wide_graph(graph: Graph) -> Graph:
    return widen(replace(graph, outputs=graph.results, states=()))


def folded_in_float32(program: Program) -> Callable[[Tensors], tuple[torch.Tensor, ...]]:
    """As `in_float32`, with what depends on weights alone computed in the program's own dtypes, as
    by a pass that folds constants: the rounding of 1 + bias in 16 bits is no error."""
    source, wide_program = program.graph, widened(Module.of(program)).main
    graph = wide_program.graph
    tensors = {param: program.weights[param.name] for param in source.params}
    constants: dict[Value, torch.Tensor] = {}
    with torch.no_grad():
        for op, widened_op in zip(source.ops, graph.ops, strict=True):
            if op.inputs and all(v in tensors for v in op.inputs) and not [*size_expressions(op)]:
                results = run_op(op, [tensors[value] for value in op.inputs], {})
                tensors |= dict(zip(op.outputs, results, strict=True))
                constants |= dict(zip(widened_op.outputs, map(wide, results), strict=True))
    weights = [wide_program.weights[param.name] for param in graph.params]

    def run(inputs: Tensors) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return run_graph(graph, [*map(wide, inputs), *weights], precomputed=constants)

    return run


def widened(module: Module) -> Module:
    """The programs with every bf16 and f16 upcast to float32; the states' new contents are outputs.
    Weights that programs share are cast once."""
    casts: dict[int, torch.Tensor] = {}

    def cast(weight: torch.Tensor) -> torch.Tensor:
        if id(weight) not in casts:
            casts[id(weight)] = wide(weight)
        return casts[id(weight)]

    programs = {}
    for name, program in module.programs.items():
        graph = _wide_graph(program.graph)
        weights = {param.name: cast(program.weights[param.name]) for param in graph.params}
        programs[name] = Program(graph, weights)
    return Module(programs)


def eager_in_float32(
    eager: Callable[..., tuple[torch.Tensor, ...]], noise: float = 0.0, seed: int = 0
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A module in eager PyTorch that computes in float32 in place of 16-bit floats, with relative
    `noise` of that standard deviation on the results of products, sums and activations."""

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with InFloat32(noise, seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of mixed dtypes before they are cast
            return eager(*(wide(tensor.clone()) for tensor in inputs))

    return run


def wide(value: Any) -> Any:
    """A 16-bit float tensor or dtype as float32; any other value unchanged."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _LOW else value
    low = isinstance(value, torch.Tensor) and value.dtype in _LOW
    return value.float() if low else value


class InFloat32(TorchDispatchMode):  # type: ignore[misc]
    """A mode in which eager computes in float32 instead of 16-bit floats.

    Operators get float32 for each 16-bit float tensor and dtype, so that weights are cast as they
    are read. Tensors that are written in place keep their dtype. `noise` is that of
    `eager_in_float32`.
    """

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.noise = noise
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if "_assert_tensor_metadata" in str(func):
            return None
        named = dict(kwargs or {})
        if schema_of(func).is_mutable:
            target = args[0] if args else None
            if isinstance(target, torch.Tensor) and target.dtype in _LOW:
                return func(*args, **named)
        result = func(*pytree.tree_map(wide, args), **pytree.tree_map(wide, named))
        if self.noise and schema_of(func).name in _ROUNDED and result.dtype in _WIDE:
            drawn = torch.randn(result.shape, generator=self.generator, dtype=result.dtype)
            return result * (1 + self.noise * drawn)
        return result


_ROUNDED = frozenset(
    f"aten::{name}"
    for name in "mm addmm bmm baddbmm mul add sub div _softmax silu gelu relu sigmoid".split()
)
"""Operators whose results 16 bits round, one tensor each."""
