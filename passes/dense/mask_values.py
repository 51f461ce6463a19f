"""What a value that depends on sizes only holds at chosen places, without computing all of it.

A mask of S by L would need S*L elements; for sizes beyond a window of 100,000 keys nobody can
compute that while compiling. So small tensors are computed whole, and large ones only where
they are asked for: element by element, through the ops that made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from moec.errors import NoMatch
from moec.interpret.evaluate import run_op
from moec.ir import aten
from moec.ir.dims import Dim, evaluate_dim
from moec.ir.graph import Graph, Op, Ref, Value

Places = tuple[torch.Tensor, ...]
"""One index per axis, all of one length: the places at which a tensor is read."""

SMALL = 1 << 20  # elements of a tensor that is computed whole

_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "floor_divide", "remainder", "fmod", "neg", "abs", "sign"),
    *("minimum", "maximum", "clamp", "eq", "ne", "lt", "le", "gt", "ge", "where", "_to_copy"),
    *("logical_and", "logical_or", "logical_not", "logical_xor"),
    *("bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor"),
)
_STRETCHING = ("mul", "div", "floor_divide", "remainder", "fmod")
FILLED = tuple(f"aten.{n}.default" for n in ("full", "full_like", "zeros_like", "ones_like"))
_MOVED = ("reshape", "expand", "permute", "slice", "index", "tril", "triu")
_WHOLE = ("arange", "scalar_tensor", "cat", "cumsum", "select")  # small wherever they are met


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
    made: Mapping[Value, Op],
) -> Cut:
    """Everything that `values` are computed from; `made` gives the op of each value.

    Raises NoMatch where that includes an input's data, or an op outside the ones above.
    """
    inputs, params = set(graph.inputs), set(graph.params)
    ops: dict[Op, None] = {}
    leaves: dict[Value, torch.Tensor] = {}
    pending: list[tuple[Value, bool]] = [(value, False) for value in values]
    while pending:
        value, ready = pending.pop()
        if value in inputs:
            raise NoMatch(f"the mask depends on what is in {value.name}, not on sizes only")
        if value in params:
            leaves[value] = weights[value.name]
            continue
        op = made[value]
        if op in ops:
            continue
        if ready:
            ops[op] = None
            continue
        if not _studied(op, made):
            raise NoMatch(f"the mask is computed with {op.name}, whose values are not studied")
        pending.append((value, True))
        if op.name not in FILLED:
            pending += [(v, False) for v in op.inputs]
    return Cut(tuple(ops), leaves)


def _studied(op: Op, made: Mapping[Value, Op]) -> bool:
    kind = _kind(op)
    if kind in _STRETCHING and sum(bool(v.shape) for v in op.inputs) == 2:
        # A product of two positions grows in other places than at the constants.
        return any(_is_flag(v, made) for v in op.inputs)
    return op.name in FILLED or kind in (*_ELEMENTWISE, *_MOVED, *_WHOLE)


def _is_flag(value: Value, made: Mapping[Value, Op]) -> bool:
    op = made.get(value)
    cast = op is not None and op.name == "aten._to_copy.default"
    return value.dtype == "bool" or (cast and op.inputs[0].dtype == "bool")  # type: ignore[union-attr]


@dataclass
class Elements:
    """Elements of a cut's values where the named sizes are those of `sizes`."""

    source: Cut
    sizes: Mapping[str, int]
    whole: dict[Value, torch.Tensor] = field(default_factory=dict)
    producers: dict[Value, Op] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole |= self.source.weights
        for op in self.source.ops:
            (value,) = op.outputs
            self.producers[value] = op
            if math.prod(self.shape(value)) <= SMALL and self._computable(op):
                self.whole[value] = self._compute(op)

    def shape(self, value: Value) -> tuple[int, ...]:
        return self.known(value.shape)

    def known(self, shape: Sequence[Dim]) -> tuple[int, ...]:
        return tuple(evaluate_dim(dim, self.sizes) for dim in shape)

    def _computable(self, op: Op) -> bool:
        return op.name in FILLED or all(v in self.whole for v in op.inputs)

    def _compute(self, op: Op) -> torch.Tensor:
        if op.name in FILLED:
            (value,) = op.outputs
            return torch.full(self.shape(value), _fill(op), dtype=aten.TORCH_DTYPES[value.dtype])
        return run_op(op, [self.whole[v] for v in op.inputs], self.sizes)[0]

    def at(self, value: Value, places: Places) -> torch.Tensor:
        """The elements at `places`; of a value without axes, itself.

        Raises NoMatch for a large tensor of which single elements cannot be computed.
        """
        if not value.shape and value in self.whole:
            return self.whole[value]
        if value in self.whole:
            return self.whole[value][places]
        op = self.producers[value]
        kind = _kind(op)
        if op.name in FILLED:
            dtype = aten.TORCH_DTYPES[value.dtype]
            return torch.full((len(places[0]),), _fill(op), dtype=dtype)
        if kind in _ELEMENTWISE:
            return self._elementwise(op, places)
        if kind in _MOVES:
            return _MOVES[kind](self, op, places)
        raise NoMatch(f"{value} is too large to study: {op.name} makes it")

    def _elementwise(self, op: Op, places: Places) -> torch.Tensor:
        parts = [self.at(v, self.broadcast(v, places)) for v in op.inputs]
        return cast(torch.Tensor, aten.call(op, parts, self.sizes)[0])

    def broadcast(self, value: Value, places: Places) -> Places:
        """Where a value is read that broadcasts to something read at `places`."""
        shape = self.shape(value)
        return tuple(
            torch.zeros_like(place) if size == 1 else place
            for size, place in zip(shape, places[len(places) - len(shape) :], strict=True)
        )

    def _reshape(self, op: Op, places: Places) -> torch.Tensor:
        flat = torch.zeros_like(places[0])
        for size, place in zip(self.shape(op.outputs[0]), places, strict=True):
            flat = flat * size + place
        found: list[torch.Tensor] = []
        for size in reversed(self.shape(op.inputs[0])):
            found.append(flat % max(size, 1))
            flat = flat // max(size, 1)
        return self.at(op.inputs[0], tuple(reversed(found)))

    def _expand(self, op: Op, places: Places) -> torch.Tensor:
        return self.at(op.inputs[0], self.broadcast(op.inputs[0], places))

    def _permute(self, op: Op, places: Places) -> torch.Tensor:
        dims = cast("tuple[int, ...]", op.attrs["dims"])
        found = list(places)
        for axis, source in enumerate(dims):
            found[source] = places[axis]
        return self.at(op.inputs[0], tuple(found))

    def _slice(self, op: Op, places: Places) -> torch.Tensor:
        axis = cast(int, op.attrs.get("dim", 0)) % len(places)
        size = self.shape(op.inputs[0])[axis]
        start = aten.concrete(op.attrs.get("start"), (), self.sizes) or 0
        start = min(max(start + size if start < 0 else start, 0), size)
        step = cast(int, op.attrs.get("step", 1))
        moved = (*places[:axis], places[axis] * step + start, *places[axis + 1 :])
        return self.at(op.inputs[0], moved)

    def _index(self, op: Op, places: Places) -> torch.Tensor:
        indices = cast("tuple[Any, ...]", op.attrs["indices"])
        if not all(isinstance(index, Ref) for index in indices):
            raise NoMatch(f"{op.outputs[0]} is too large to study: it leaves axes out")
        picks = [op.inputs[index.index] for index in indices]
        rank = len(places) - (len(op.inputs[0].shape) - len(picks))
        found: list[torch.Tensor] = []
        for size, pick in zip(self.shape(op.inputs[0]), picks, strict=False):
            at = self.at(pick, self.broadcast(pick, places[:rank]))
            found.append(torch.where(at < 0, at + size, at))
        return self.at(op.inputs[0], (*found, *places[rank:]))

    def _triangle(self, op: Op, places: Places) -> torch.Tensor:
        found = self.at(op.inputs[0], places)
        beyond = (
            places[-1] - places[-2] - aten.concrete(op.attrs.get("diagonal", 0), (), self.sizes)
        )
        kept = beyond <= 0 if _kind(op) == "tril" else beyond >= 0
        return torch.where(kept, found, torch.zeros_like(found))


_MOVES: dict[str, Callable[[Elements, Op, Places], torch.Tensor]] = {
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
