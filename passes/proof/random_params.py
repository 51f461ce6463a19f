"""Random params of a proof: of the real shapes, each always the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.ir.sizes.dims import evaluate_dim
from moec.ir.traits import CASTS, CHOICES, VIEWS

_POOL = 1 << 22
_FEW = 1 << 14
_ROOTS = ("aten.sqrt.default", "aten.rsqrt.default", "aten.log.default")
_SHIFTS = VIEWS | CASTS | {"aten.add.Tensor", "aten.select.int", "aten.stack.default"}


@dataclass
class RandomParams:
    """Params by random numbers; constants have those of `weights`, the program's."""

    weights: Mapping[str, torch.Tensor]
    pools: dict[float, torch.Tensor] = field(default_factory=dict)

    def _pool(self, scale: float) -> torch.Tensor:
        if scale not in self.pools:
            self.pools[scale] = _normal() * scale
        return self.pools[scale]

    def of(self, before: Graph, params: Iterable[Value], scale: float) -> list[torch.Tensor]:
        """Tensors for `params`, those of a region or of its replacement. Params that correct scores
        are multiplied by `scale`."""
        numbers = {p: n for n, p in enumerate(dict.fromkeys((*before.params, *params)))}
        roots, corrected = under_roots(before), corrections(before)
        return [
            drawn * scale if param in corrected else drawn
            for param in params
            for drawn in (self._draw(param, numbers[param], param in roots),)
        ]

    def _draw(self, value: Value, index: int, positive: bool = False) -> torch.Tensor:
        shape = tuple(evaluate_dim(d, {}) for d in value.shape)
        if is_constant(value):
            real = self.weights.get(value.name)
            if real is None:
                raise NoMatch(f"the values of the constant {value.name} are not known")
            return real.float() if value.dtype in FLOATS and real.dtype != torch.float64 else real
        dtype = torch.float64 if value.dtype == "f64" else torch.float32
        scale = max(shape[-1], 1) ** -0.5 if len(shape) > 1 else 1.0
        # The same numbers: a pool has millions, and most proofs read a few hundred of them.
        if math.prod(shape) <= _FEW:
            values = window(_normal(), shape, 7919 * index) * scale
        else:
            values = window(self._pool(scale), shape, 7919 * index)
        values = values.to(dtype)
        return values.abs() if positive else values


def under_roots(graph: Graph) -> frozenset[Value]:
    """The params of which, plus constants, roots are taken, such as the variances of a norm."""
    sources = {value: op for op in graph.ops for value in op.outputs}
    params = set(graph.params)
    positive = set()
    for op in graph.ops:
        if op.name in _ROOTS:
            value = op.inputs[0]
            while value in sources and sources[value].name in _SHIFTS and sources[value].inputs:
                value = sources[value].inputs[0]
            positive |= {value} & params
    return frozenset(positive)


def corrections(graph: Graph) -> frozenset[Value]:
    """The params that are added to scores before experts are chosen: with large numbers in them all
    tokens would choose the same experts in the same order."""
    sources = {value: op for op in graph.ops for value in op.outputs}
    params, added = set(graph.params), set()
    pending = [op.inputs[0] for op in graph.ops if op.name in CHOICES]
    visited: set[Op] = set()
    while pending:
        op = sources.get(pending.pop())
        if op is None or op in visited or op.name not in _SHIFTS:
            continue
        visited.add(op)
        pending += op.inputs
        if op.name == "aten.add.Tensor":
            added |= {_before_views(sources, value) for value in op.inputs} & params
    return frozenset(added)


def _before_views(sources: Mapping[Value, Op], value: Value) -> Value:
    while value in sources and sources[value].name in VIEWS | CASTS:
        value = sources[value].inputs[0]
    return value


@cache
def _normal() -> torch.Tensor:
    """Random numbers that all pools share: drawing them would take longer than most proofs."""
    return torch.randn(_POOL, generator=torch.Generator().manual_seed(19))


def window(pool: torch.Tensor, shape: tuple[int, ...], start: int) -> torch.Tensor:
    """A random tensor: distinct elements where it is small, overlapping windows where not."""
    count = 1
    for size in shape:
        count *= size
    if count <= 1 << 20:
        start %= len(pool) - count
        return pool[start : start + count].reshape(shape)
    # Odd strides: no window is symmetric, and no two experts or rows are equal.
    strides, reach = [], 1
    for axis, size in enumerate(reversed(shape)):
        strides.append((1, 7, 10007, 1000003)[min(axis, 3)])
        reach += strides[-1] * (size - 1)
    source = pool.repeat(-(-(reach + 8192) // len(pool))) if reach + 8192 > len(pool) else pool
    return source.as_strided(shape, tuple(reversed(strides)), start % 8192)


def is_constant(value: Value) -> bool:
    """Whether a param keeps its real content (ids, masks, scalars); all others are random."""
    return value.dtype not in FLOATS or not value.shape
