"""Runs models in float32 in place of 16-bit floats, to exclude rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from moec.ir.formats.integer import dequantised_once
from moec.ir.graph import Graph, Module, Program, Value
from moec.ir.interpret.evaluate import bind, check_bounds, run_op, run_part
from moec.ir.opdef import Reference
from moec.ir.replace_sizes import size_expressions
from moec.ir.upcast import widen
from moec.torch_private import TorchDispatchMode, pytree, schema_of

MEANING = 2e-4
"""Equivalent graphs in float32 differ by less than this, relative to the greatest value."""

Tensors = Sequence[torch.Tensor]
Results = tuple[torch.Tensor, ...]
_ROWS = "aten.embedding.default"  # its rows are cast, and not all of its table
_LOW, _WIDE = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)


def in_float32(program: Program, *, anywhere: bool = False) -> Callable[[Tensors], Results]:
    """The program in eager PyTorch with every bf16 and f16 upcast to float32: a function from
    inputs (states' contents last) to outputs and the states' new contents. `anywhere` evaluates it
    outside of its bounds too.
    """
    run = _runner(program, anywhere=anywhere)
    return lambda inputs: run([inputs])[0]


def all_in_float32(
    program: Program,
    cases: Sequence[Tensors],
    *,
    folded: bool = False,
    meanings: Sequence[Mapping[str, Reference]] = (),
) -> list[Results]:
    """The results of `in_float32` in each case; a weight is read and cast once for all. `folded`:
    what depends on no input is computed in the program's own dtypes, as by a pass that folds
    constants: the rounding of 1 + bias in 16 bits is no error. `meanings` overrides
    in each case those of some ops."""
    return _runner(program, folded=folded, meanings=meanings)(cases)


def _runner(
    program: Program,
    *,
    folded: bool = False,
    anywhere: bool = False,
    meanings: Sequence[Mapping[str, Reference]] = (),
) -> Callable[[Sequence[Tensors]], list[Results]]:
    """A function that evaluates cases op by op, all of them together. A weight is cast for each op
    that reads it, so that one is in memory in float32 at a time."""
    source = replace(program.graph, outputs=program.graph.results, states=())
    graph = _exact_rows(widen(source))
    constant = [not [*size_expressions(op)] for op in source.ops]

    def run_all(cases: Sequence[Tensors]) -> list[Results]:
        narrow = {param: program.weights[param.name] for param in source.params}
        each: list[tuple[dict[Value, torch.Tensor], dict[str, int]]] = []
        for case in cases:
            sizes: dict[str, int] = {}
            inputs = [wide(tensor) for tensor in case]
            if not anywhere:
                check_bounds(graph, inputs)
            each.append((bind(replace(graph, params=()), inputs, sizes), sizes))
        for index, (op, wide_op) in enumerate(zip(source.ops, graph.ops, strict=True)):
            if folded and constant[index] and all(value in narrow for value in op.inputs):
                results = run_op(op, [narrow[value] for value in op.inputs], {})
                narrow |= dict(zip(op.outputs, results, strict=True))
            else:
                pairs = zip(op.inputs, wide_op.inputs, strict=True)
                read = {wider: narrow[value] for value, wider in pairs if value in narrow}
                casts = read if op.name == _ROWS else {v: wide(t) for v, t in read.items()}
                with dequantised_once(), InFloat32() if casts is read else nullcontext():
                    for (values, sizes), table in zip_longest(each, meanings):
                        values |= casts
                        run_part(graph, range(index, index + 1), values, sizes, table)
                        for value in casts:
                            values.pop(value, None)
            for value in source.last_reads.get(index, ()):
                narrow.pop(value, None)
        ends = list(zip(source.outputs, graph.outputs, strict=True))
        return [
            tuple(wide(narrow[v]) if v in narrow else values[wider] for v, wider in ends)
            for values, _ in each
        ]

    def run(cases: Sequence[Tensors]) -> list[Results]:
        with torch.no_grad():
            return run_all(cases)

    return run


def _exact_rows(graph: Graph) -> Graph:
    """The graph with the rows of grouped.compressed as they are. Their rounding to 16 bits begins
    where `fuse-decompress` joins decoding and product, and moves a row with one large element by
    some 1e-3."""
    exact = {"grouped.compressed": {"row_bits": 0}}
    ops = tuple(replace(op, attrs={**op.attrs, **exact.get(op.name, {})}) for op in graph.ops)
    return replace(graph, ops=ops)


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
        graph = widen(replace(program.graph, outputs=program.graph.results, states=()))
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
        if str(func) == _ROWS:
            return wide(func(*args, **named))
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
    for name in (
        "mm addmm bmm baddbmm mul add sub div sum mean _softmax silu gelu relu sigmoid".split()
    )
)
"""Operators whose results 16 bits round, one tensor each."""
