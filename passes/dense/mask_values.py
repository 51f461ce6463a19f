"""Single elements of values that depend only on sizes, without computing the whole tensor.

A mask of S by L has S*L elements: with a window of 100,000 keys, too many to compute while
compiling. So small tensors are computed in full, and large ones only at requested positions:
element by element, through the ops that produce them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from moec.errors import NoMatch
from moec.ir import aten
from moec.ir.graph import Graph, Op, Ref, Value
from moec.ir.interpret.evaluate import run_op
from moec.ir.sizes.dims import Dim, evaluate_dim

Positions = tuple[torch.Tensor, ...]
"""One index tensor i64[N] per axis: the N positions at which a tensor is read."""

SMALL = 1 << 20  # elements of a tensor that is computed in full

_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "floor_divide", "remainder", "fmod", "neg", "abs", "sign"),
    *("minimum", "maximum", "clamp", "eq", "ne", "lt", "le", "gt", "ge", "where", "_to_copy"),
    *("logical_and", "logical_or", "logical_not", "logical_xor"),
    *("bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor"),
)
_STRETCHING = ("mul", "div", "floor_divide", "remainder", "fmod")
FILLED = tuple(f"aten.{n}.default" for n in ("full", "full_like", "zeros_like", "ones_like"))
_MOVED = ("reshape", "expand", "permute", "slice", "index", "tril", "triu")
_WHOLE = ("arange", "scalar_tensor", "cat", "cumsum", "select")  # small in all cases


def _kind(op: Op) -> str:
    return op.name.split(".")[1] if op.name.startswith("aten.") else op.name


@dataclass(frozen=True)
class Cut:
    """The ops between sizes (and weights) and some values, in order."""

    ops: tuple[Op, ...]
    weights: Mapping[Value, torch.Tensor]


def cut(
    values: Sequence[Value],
    graph: Graph,
    weights: Mapping[str, torch.Tensor],
    producers: Mapping[Value, Op],
) -> Cut:
    """The ops and weights that `values` are computed from; `producers` has the op of each value.

    Raises NoMatch if they depend on an input's data, or on an op outside the lists above.
    """
    inputs, params = set(graph.inputs), set(graph.params)
    ops: dict[Op, None] = {}
    leaves: dict[Value, torch.Tensor] = {}
    pending: list[tuple[Value, bool]] = [(value, False) for value in values]
    while pending:
        value, ready = pending.pop()
        if value in inputs:
            raise NoMatch(f"the mask depends on the values of {value.name}, not only on sizes")
        if value in params:
            leaves[value] = weights[value.name]
            continue
        op = producers[value]
        if op in ops:
            continue
        if ready:
            ops[op] = None
            continue
        if not _is_supported(op, producers):
            raise NoMatch(f"the mask is computed with {op.name}, for which no rule is known")
        pending.append((value, True))
        if op.name not in FILLED:
            pending += [(v, False) for v in op.inputs]
    return Cut(tuple(ops), leaves)


def _is_supported(op: Op, producers: Mapping[Value, Op]) -> bool:
    kind = _kind(op)
    if kind in _STRETCHING and sum(bool(v.shape) for v in op.inputs) == 2:
        # A product of two positions changes at positions other than the constants.
        return any(_is_flag(v, producers) for v in op.inputs)
    return op.name in FILLED or kind in (*_ELEMENTWISE, *_MOVED, *_WHOLE)


def _is_flag(value: Value, producers: Mapping[Value, Op]) -> bool:
    op = producers.get(value)
    cast = op is not None and op.name == "aten._to_copy.default"
    return value.dtype == "bool" or (cast and op.inputs[0].dtype == "bool")  # type: ignore[union-attr]


@dataclass
class Elements:
    """Elements of a cut's values for given `sizes`; `computed` are the tensors known in full."""

    source: Cut
    sizes: Mapping[str, int]
    computed: dict[Value, torch.Tensor] = field(default_factory=dict)
    producers: dict[Value, Op] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.computed |= self.source.weights
        for op in self.source.ops:
            (value,) = op.outputs
            self.producers[value] = op
            if math.prod(self.shape(value)) <= SMALL and self._computable(op):
                self.computed[value] = self._compute(op)

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.sizes_of(value.shape)

    def sizes_of(self, shape: Sequence[Dim]) -> tuple[int, ...]:
        return tuple(evaluate_dim(dim, self.sizes) for dim in shape)

    def _computable(self, op: Op) -> bool:
        return op.name in FILLED or all(v in self.computed for v in op.inputs)

    def _compute(self, op: Op) -> torch.Tensor:
        if op.name in FILLED:
            (value,) = op.outputs
            return torch.full(self.shape(value), _fill(op), dtype=aten.TORCH_DTYPES[value.dtype])
        return run_op(op, [self.computed[v] for v in op.inputs], self.sizes)[0]

    def at(self, value: Value, positions: Positions) -> torch.Tensor:
        """The elements [N] at `positions`; a value without axes itself.

        Raises NoMatch for a large tensor of which single elements cannot be computed.
        """
        if not value.shape and value in self.computed:
            return self.computed[value]
        if value in self.computed:
            return self.computed[value][positions]
        op = self.producers[value]
        kind = _kind(op)
        if op.name in FILLED:
            dtype = aten.TORCH_DTYPES[value.dtype]
            return torch.full((len(positions[0]),), _fill(op), dtype=dtype)
        if kind in _ELEMENTWISE:
            return self._elementwise(op, positions)
        if kind in _MOVES:
            return _MOVES[kind](self, op, positions)
        raise NoMatch(f"{value} is too large to analyse: {op.name} makes it")

    def _elementwise(self, op: Op, positions: Positions) -> torch.Tensor:
        parts = [self.at(v, self.broadcast(v, positions)) for v in op.inputs]
        return cast(torch.Tensor, aten.call(op, parts, self.sizes)[0])

    def broadcast(self, value: Value, positions: Positions) -> Positions:
        """The positions of a value that is broadcast to a tensor read at `positions`."""
        shape = self.shape(value)
        return tuple(
            torch.zeros_like(position) if size == 1 else position
            for size, position in zip(shape, positions[len(positions) - len(shape) :], strict=True)
        )

    def _reshape(self, op: Op, positions: Positions) -> torch.Tensor:
        flat = torch.zeros_like(positions[0])
        for size, position in zip(self.shape(op.outputs[0]), positions, strict=True):
            flat = flat * size + position
        indices: list[torch.Tensor] = []
        for size in reversed(self.shape(op.inputs[0])):
            indices.append(flat % max(size, 1))
            flat = flat // max(size, 1)
        return self.at(op.inputs[0], tuple(reversed(indices)))

    def _expand(self, op: Op, positions: Positions) -> torch.Tensor:
        return self.at(op.inputs[0], self.broadcast(op.inputs[0], positions))

    def _permute(self, op: Op, positions: Positions) -> torch.Tensor:
        dims = cast("tuple[int, ...]", op.attrs["dims"])
        indices = list(positions)
        for axis, source in enumerate(dims):
            indices[source] = positions[axis]
        return self.at(op.inputs[0], tuple(indices))

    def _slice(self, op: Op, positions: Positions) -> torch.Tensor:
        axis = cast(int, op.attrs.get("dim", 0)) % len(positions)
        size = self.shape(op.inputs[0])[axis]
        start = aten.resolve_attr(op.attrs.get("start"), (), self.sizes) or 0
        start = min(max(start + size if start < 0 else start, 0), size)
        step = cast(int, op.attrs.get("step", 1))
        moved = (*positions[:axis], positions[axis] * step + start, *positions[axis + 1 :])
        return self.at(op.inputs[0], moved)

    def _index(self, op: Op, positions: Positions) -> torch.Tensor:
        indices = cast("tuple[Any, ...]", op.attrs["indices"])
        if not all(isinstance(index, Ref) for index in indices):
            raise NoMatch(f"{op.outputs[0]} is too large to analyse: it leaves axes out")
        picks = [op.inputs[index.index] for index in indices]
        rank = len(positions) - (len(op.inputs[0].shape) - len(picks))
        picked: list[torch.Tensor] = []
        for size, pick in zip(self.shape(op.inputs[0]), picks, strict=False):
            at = self.at(pick, self.broadcast(pick, positions[:rank]))
            picked.append(torch.where(at < 0, at + size, at))
        return self.at(op.inputs[0], (*picked, *positions[rank:]))

    def _triangle(self, op: Op, positions: Positions) -> torch.Tensor:
        values = self.at(op.inputs[0], positions)
        beyond = (
            positions[-1]
            - positions[-2]
            - aten.resolve_attr(op.attrs.get("diagonal", 0), (), self.sizes)
        )
        inside = beyond <= 0 if _kind(op) == "tril" else beyond >= 0
        return torch.where(inside, values, torch.zeros_like(values))


_MOVES: dict[str, Callable[[Elements, Op, Positions], torch.Tensor]] = {
    "reshape": Elements._reshape,
    "expand": Elements._expand,
    "permute": Elements._permute,
    "slice": Elements._slice,
    "index": Elements._index,
    "tril": Elements._triangle,
    "triu": Elements._triangle,
}


def _fill(op: Op) -> Any:
    return {"zeros_like": 0, "ones_like": 1}.get(_kind(op), op.attrs.get("fill_value"))
