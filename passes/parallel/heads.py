"""Finds the ops that compute each head of an attention, between the products q, k, v and out.

linear -> reshape [B, S, H, d] -> norm? -> permute -> rotary? -> (append to a cache)
       -> nn.attention -> permute -> reshape [B, S, H*d] -> linear

In latent attention (arXiv 2405.04434) the first linear layers are those that read the latent
vectors, which have no heads. A head has a part of its own and a part that all heads share, or that
rotary turns; the parts are split, expanded over the heads, and joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import sympy

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.ops.dense.attention import Attention
from moec.ir.sizes.dims import Dim
from moec.passes.core.moe_layer import constant

_LINEAR = "aten.linear.default"
_RESHAPE = "aten.reshape.default"
_PERMUTE = "aten.permute.default"
# Ops that act on each head separately, whichever axis the heads are on; the heads are input 0.
_BY_HEAD = ("nn.rotary", "nn.rms_norm", "aten._to_copy.default", "aten.alias.default")
# Ops along another axis than that of the heads, and by input 0.
_ALONG = ("aten.split_with_sizes.default", "aten.slice.Tensor")
# Ops that join values of equal heads; those without values, in which others are written.
_JOIN = ("aten.cat.default", "aten.slice_scatter.default", "aten.copy.default")
_EMPTY = "aten.empty.memory_format"
_EXPAND = "aten.expand.default"


@dataclass(frozen=True)
class Heads:
    """The ops of the heads of one attention. `ops` includes `output`, the product that sums over
    the heads. `axes` gives the axis of the heads in each value, `texts` is the size of the first
    axis, and `caches` are inputs of the graph."""

    ops: frozenset[Op]
    output: Op
    axes: Mapping[Value, int]
    texts: sympy.Symbol
    caches: Sequence[Value]


def heads_of(program: Program, attention: Op, degree: int) -> Heads:
    """The heads of `attention`. Raises NoMatch with the reason if `degree` ranks cannot split
    them."""
    a, graph = Attention.of(attention), program.graph
    if a.tokens_first:
        raise NoMatch("only attention [B, heads, S, d] can be split by heads")
    for name, what in (("q", "heads"), ("k", "key-value heads")):
        count = a.shape(name)[1]
        if not isinstance(count, int) or count % degree:
            raise NoMatch(f"{count} {what} cannot be split over {degree} ranks")
    texts = a.q.shape[0]
    if not isinstance(texts, sympy.Symbol):
        raise NoMatch(f"its number of texts is {texts}, no size of its own")
    walk = _Walk(program, texts)
    for value in (a.q, a.k, a.v):
        if walk.axis(value) != 1:
            raise NoMatch(f"the heads of {value.name} are not found in its linear layers")
    if a.mask is not None:
        walk.outside(a.mask, heads_axis=1)
    if a.first is not None:
        walk.outside(a.first)
    if a.sinks is not None:
        constant(program, a.sinks)
    walk.ops.add(attention)
    walk.axes[attention.outputs[0]] = 1
    output = walk.forward(attention.outputs[0])
    heads = Heads(frozenset({*walk.ops, output}), output, walk.axes, texts, walk.caches)
    _require_alone(graph, heads)
    return heads


@dataclass
class _Walk:
    program: Program
    texts: sympy.Symbol
    ops: set[Op] = field(default_factory=set)
    axes: dict[Value, int] = field(default_factory=dict)
    caches: list[Value] = field(default_factory=list)

    def axis(self, value: Value) -> int:
        """The axis of the heads in `value`, and records the ops that compute it. Raises NoMatch for
        an op that does not keep heads separate."""
        if value in self.axes:
            return self.axes[value]
        op = self.program.graph.producers.get(value)
        if op is None:
            raise NoMatch(f"{value.name} is not a linear function of the layer's input")
        if op.name == _LINEAR:
            for weight in op.inputs[1:]:
                constant(self.program, weight)
            self.outside(op.inputs[0])
            axis = len(value.shape) - 1
        elif op.name == _EXPAND:
            axis = _expanded(op)
            self.outside(op.inputs[0], heads_axis=axis)
        elif op.name in _JOIN:
            axis = self.joined(op)
        elif op.name == "nn.append":
            cache, rows, *others = op.inputs
            if self.axis(rows) != 1:
                raise NoMatch(f"the heads of {rows.name} are not found in its linear layers")
            for other in others:
                self.outside(other, heads_axis=1)
            self.caches.append(cache)
            self.axes[cache] = axis = 1
        else:
            axis = self.moved(op, self.axis(op.inputs[0]))
        self.ops.add(op)
        self.axes |= dict.fromkeys(op.outputs, axis)
        return axis

    def joined(self, op: Op) -> int:
        """The axis of the heads that all inputs of `op` have. Raises NoMatch if they differ."""
        empty = [value for value in op.inputs if self.is_empty(value)]
        axes = {self.axis(value) for value in op.inputs if value not in empty}
        axis = axes.pop() if len(axes) == 1 else None
        shape = op.outputs[0].shape
        if axis is None or any(len(v.shape) != len(shape) for v in op.inputs) or _dim(op) == axis:
            raise _mixes(op)
        for value in empty:
            self.fill(value, axis)
        return axis

    def is_empty(self, value: Value) -> bool:
        """Whether a value is memory that was not written, or a part of it."""
        op = self.program.graph.producers.get(value)
        if op is not None and op.name == "aten.slice.Tensor":
            return self.is_empty(op.inputs[0])
        return op is not None and op.name == _EMPTY

    def fill(self, value: Value, axis: int) -> None:
        """Records the ops of an empty value in which heads are written at `axis`."""
        op = self.program.graph.producers[value]
        if op.inputs:
            self.fill(op.inputs[0], axis)
            if self.moved(op, axis) != axis:
                raise _mixes(op)
        self.ops.add(op)
        self.axes[value] = axis

    def moved(self, op: Op, axis: int) -> int:
        """The axis of the heads after `op`, if the first input has them at `axis`. Raises NoMatch
        for an op that does not keep heads separate."""
        x, out = op.inputs[0].shape, op.outputs[0].shape
        if op.name == _PERMUTE:
            return cast("tuple[int, ...]", op.attrs["dims"]).index(axis)
        last = len(x) - 1
        if op.name == _RESHAPE and axis == last and _plain(out[:-2]) == _plain(x[:-1]):
            return len(out) - 2
        if op.name == _RESHAPE and axis == last - 1 and x[:-2] == out[:-1]:
            return len(out) - 1
        if op.name in _BY_HEAD and not (op.name == "nn.rms_norm" and axis == last):
            for other in op.inputs[1:]:
                self.outside(other, heads_axis=axis - len(x))
            return axis
        if op.name in _ALONG and _dim(op) != axis:
            return axis
        raise _mixes(op)

    def outside(self, value: Value, heads_axis: int | None = None) -> None:
        """Checks a value that all heads read in full: it may have texts only as its first axis, and
        with `heads_axis` it must broadcast along the heads. Raises NoMatch otherwise."""
        sizes = [dim for dim in value.shape[1:] if not isinstance(dim, int)]
        if any(self.texts in dim.free_symbols for dim in sizes) or (
            value.shape and value.shape[0] != self.texts and _mentions(value.shape[0], self.texts)
        ):
            raise NoMatch(f"{value.name} has no separate axis of sequences")
        rank = len(value.shape)
        if heads_axis is not None and -rank <= heads_axis < rank and value.shape[heads_axis] != 1:
            raise NoMatch(f"{value.name} has one value per head")

    def forward(self, value: Value) -> Op:
        """The product that sums over the heads of `value`, and records the ops before it. Raises
        NoMatch if there is none."""
        while True:
            readers = self.program.graph.readers.get(value, ())
            if len(readers) != 1 or value in self.program.graph.results:
                raise NoMatch(
                    f"{value.name} is read by other ops than the linear layer after attention"
                )
            (op,), axis = readers, self.axes[value]
            if op.name == _LINEAR:
                if axis != len(value.shape) - 1:
                    raise NoMatch("the linear layer after attention does not sum over the heads")
                for weight in op.inputs[1:]:
                    constant(self.program, weight)
                return op
            if len(op.outputs) > 1:
                raise _mixes(op)
            self.ops.add(op)
            value = op.outputs[0]
            self.axes[value] = self.moved(op, axis)


def _mixes(op: Op) -> NoMatch:
    return NoMatch(f"{op.name} at {op.origin} mixes heads")


def _dim(op: Op) -> int | None:
    """The axis along which an op splits or joins; None for a copy."""
    dim = op.attrs.get("dim", None if op.name == "aten.copy.default" else 0)
    return None if dim is None else cast(int, dim) % len(op.outputs[0].shape)


def _expanded(op: Op) -> int:
    """The axis that an expand adds to or repeats. Raises NoMatch unless it is one fixed size."""
    x, out = op.inputs[0].shape, op.outputs[0].shape
    axes = [i for i, (a, b) in enumerate(zip(x, out, strict=False)) if a != b]
    if len(x) != len(out) or len(axes) != 1 or not isinstance(out[axes[0]], int):
        raise _mixes(op)
    return axes[0]


def _plain(shape: tuple[Dim, ...]) -> list[Dim]:
    """The sizes other than 1."""
    return [size for size in shape if size != 1]


def _mentions(dim: object, texts: sympy.Symbol) -> bool:
    return isinstance(dim, sympy.Expr) and texts in dim.free_symbols


def _require_alone(graph: Graph, heads: Heads) -> None:
    """Raises NoMatch if an op outside reads a value that is computed per head."""
    after = {state.after for state in graph.states}
    for op in heads.ops - {heads.output}:
        for value in op.outputs:
            other = [r for r in graph.readers.get(value, ()) if r not in heads.ops]
            if other or (value in graph.results and value not in after):
                what = other[0].name if other else "an output of the model"
                raise NoMatch(f"{value.name} is also read by {what}")
