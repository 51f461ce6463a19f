"""The least and the greatest value that integers of a graph can have, from the ops that make them.

    topk: f32[T, 2], ids: i64[T, 2] = aten.topk(scores)      ids are from 0 to E - 1

Indices whose range is inside of their axis need no check when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from moec.dtypes import INDEX_DTYPES
from moec.ir.aten import named
from moec.ir.graph import Graph, Op, Value
from moec.ir.index_uses import REQUIRE, IndexUse
from moec.ir.sizes.dims import Bounds, Dim, canonical, product, symbols
from moec.ir.traits import THROUGH
from moec.torch_private import FakeTensor


@dataclass(frozen=True)
class Range:
    """Both limits are values that may occur; None where there is no limit."""

    low: Dim | None = None
    high: Dim | None = None


ANY = Range()
_MOVES = THROUGH | {
    f"aten.{name}"
    for name in (
        *("slice.Tensor", "select.int", "flip.default", "roll.default", "repeat.default"),
        *("split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int", "t.default"),
        *("transpose.int", "unfold.default", "diagonal.default", "tile.default"),
        *("index_select.default", "gather.default", "index.Tensor", "take_along_dim.default"),
        "embedding.default",
    )
}
"""Ops whose output holds elements of their first input."""
_CHOOSES = frozenset(
    f"aten.{name}" for name in ("topk.default", "sort.default", "sort.stable", "max.dim", "min.dim")
)


@dataclass(frozen=True)
class ValueRanges:
    """`weights` are the constants of the graph, by name; those that are not there may have any
    value, as inputs may."""

    graph: Graph
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    _known: dict[Value, Range] = field(default_factory=dict)

    def inside(self, use: IndexUse) -> bool:
        """Whether all ids of a use are inside of its axis."""
        limits = self.of(use.ids)
        if limits.low is None or limits.high is None:
            return False
        low = limits.low + use.size if use.negative else limits.low
        return self._is_natural(low) and self._is_natural(use.size - 1 - limits.high)

    def of(self, value: Value) -> Range:
        if value not in self._known:
            self._known[value] = ANY  # of itself, while it is computed
            self._known[value] = self._of(value)
        return self._known[value]

    def _of(self, value: Value) -> Range:
        if value.dtype == "bool":
            return Range(0, 1)
        op = self.graph.producers.get(value)
        if op is None:
            return self._of_weight(value)
        if op.name == REQUIRE:
            rows: Any = op.attrs["rows"]
            return Range(-rows if op.attrs["negative"] else 0, rows - 1)
        if not op.name.startswith("aten."):
            return ANY
        if op.name in _MOVES:
            exact = op.inputs[0].dtype in (*INDEX_DTYPES, "bool")  # a cast of NaN is any number
            return self.of(op.inputs[0]) if exact else ANY
        if op.name in _CHOOSES:
            return self._chosen(op, value)
        rule = _RULES.get(op.name.split(".")[1])
        return ANY if rule is None else rule(self, op)

    def _of_weight(self, value: Value) -> Range:
        tensor = self.weights.get(value.name)
        if tensor is None or value.dtype not in INDEX_DTYPES or not tensor.numel():
            return ANY
        if tensor.device.type != "cpu" or isinstance(tensor, FakeTensor):
            return ANY
        low, high = tensor.aminmax()
        return Range(int(low), int(high))

    def _chosen(self, op: Op, value: Value) -> Range:
        x, *_ = op.inputs
        if value is op.outputs[0]:
            return self.of(x)
        return Range(0, x.shape[named(op)["dim"]] - 1 if x.shape else 0)

    def _is_natural(self, dim: Dim) -> bool:
        """Whether an expression of sizes is at least 0, for all sizes within their bounds."""
        dim = canonical(sympy.expand(dim))
        if isinstance(dim, int):
            return dim >= 0
        if dim.is_nonnegative:
            return True
        least: Any = 0
        for term in sympy.Add.make_args(dim):
            factor, rest = term.as_coeff_Mul()
            limit = 1
            for name in symbols(rest):
                bounds = self.graph.bounds.get(name, Bounds())
                end = bounds.low if factor > 0 else bounds.high
                if end is None:
                    return False
                limit *= end
            if rest != 1 and rest != sympy.Mul(*rest.free_symbols):
                return False
            least += factor * limit
        return bool(least >= 0)


def _scalar(number: Any) -> Range:
    if isinstance(number, float) and not number.is_integer():
        return ANY
    if not isinstance(number, int | float | sympy.Expr):
        return ANY
    dim = canonical(int(number) if isinstance(number, float | int) else number)
    return Range(dim, dim)


def _operand(ranges: ValueRanges, operand: Any) -> Range:
    return ranges.of(operand) if isinstance(operand, Value) else _scalar(operand)


def _union(*parts: Range) -> Range:
    lows, highs = [part.low for part in parts], [part.high for part in parts]
    return Range(
        None if None in lows else canonical(sympy.Min(*lows)),
        None if None in highs else canonical(sympy.Max(*highs)),
    )


def _arange(ranges: ValueRanges, op: Op) -> Range:
    arguments = named(op)
    step = arguments.get("step", 1)
    if not isinstance(step, int) or step < 1:
        return ANY
    start, end = _scalar(arguments.get("start", 0)), _scalar(arguments["end"])
    return Range(start.low, None if end.high is None else end.high - 1)


def _filled(ranges: ValueRanges, op: Op) -> Range:
    name = op.name.split(".")[1]
    if "full" in name:
        return _scalar(named(op)["fill_value"])
    return Range(0, 0) if "zeros" in name else Range(1, 1)


def _argument(ranges: ValueRanges, op: Op) -> Range:
    x, dim = op.inputs[0], named(op).get("dim")
    return Range(0, (product(x.shape) if dim is None or not x.shape else x.shape[dim]) - 1)


def _remainder(ranges: ValueRanges, op: Op) -> Range:
    other = named(op)["other"]
    natural = isinstance(other, int) and other > 0
    return Range(0, other - 1) if natural and op.inputs[0].dtype in INDEX_DTYPES else ANY


def _clamped(ranges: ValueRanges, op: Op) -> Range:
    arguments, x = named(op), ranges.of(op.inputs[0])
    least, most = arguments.get("min"), arguments.get("max")
    if isinstance(least, Value) or isinstance(most, Value):
        return ANY
    low = x.low if least is None else _scalar(least).low
    high = x.high if most is None else _scalar(most).high
    return Range(low, high)


def _where(ranges: ValueRanges, op: Op) -> Range:
    arguments = named(op)
    return _union(_operand(ranges, arguments["self"]), _operand(ranges, arguments["other"]))


def _joined(ranges: ValueRanges, op: Op) -> Range:
    return _union(*map(ranges.of, op.inputs))


def _sum(ranges: ValueRanges, op: Op) -> Range:
    arguments = named(op)
    a, b = _operand(ranges, arguments["self"]), _operand(ranges, arguments["other"])
    alpha = arguments.get("alpha", 1)
    if op.inputs[0].dtype not in INDEX_DTYPES or alpha != 1:
        return ANY
    if op.name.split(".")[1] == "sub":
        b = Range(None if b.high is None else -b.high, None if b.low is None else -b.low)
    return Range(
        None if a.low is None or b.low is None else a.low + b.low,
        None if a.high is None or b.high is None else a.high + b.high,
    )


def _times(ranges: ValueRanges, op: Op) -> Range:
    arguments = named(op)
    a, b = _operand(ranges, arguments["self"]), _operand(ranges, arguments["other"])
    if op.outputs[0].dtype not in INDEX_DTYPES or a.low != 0 or b.low is None or b.high is None:
        return ANY
    if not ranges._is_natural(b.low) or a.high is None:
        return ANY
    return Range(0, canonical(sympy.expand(a.high * b.high)))


def _quotient(ranges: ValueRanges, op: Op) -> Range:
    arguments, x = named(op), ranges.of(op.inputs[0])
    other = arguments["other"]
    rounds = op.name.split(".")[1] == "floor_divide" or arguments.get("rounding_mode")
    if not rounds or not isinstance(other, int) or other < 1 or x.low is None or x.high is None:
        return ANY
    if not ranges._is_natural(x.low) or op.inputs[0].dtype not in INDEX_DTYPES:
        return ANY
    # n*c - 1 divided by c is n - 1, which sympy does not see
    ends = canonical(sympy.expand((x.high + 1) / sympy.Integer(other)))
    if isinstance(ends, int) or ends.is_integer:
        return Range(0, ends - 1)
    return Range(0, canonical(sympy.floor(x.high / sympy.Integer(other))))


def _counted(ranges: ValueRanges, op: Op) -> Range:
    x = ranges.of(op.inputs[0])
    if x.low != 0 or x.high is None or not op.inputs[0].shape:
        return ANY
    return Range(0, canonical(sympy.expand(x.high * op.inputs[0].shape[named(op)["dim"]])))


def _bucket(ranges: ValueRanges, op: Op) -> Range:
    sorted_ = named(op).get("boundaries", named(op).get("sorted_sequence"))
    return Range(0, sorted_.shape[-1]) if isinstance(sorted_, Value) else ANY


def _position(ranges: ValueRanges, op: Op) -> Range:
    x = op.inputs[0]
    return Range(0, x.shape[0] - 1) if len(x.shape) == 1 else ANY


def _draw(ranges: ValueRanges, op: Op) -> Range:
    return Range(0, op.inputs[0].shape[-1] - 1)


_RULES: Mapping[str, Callable[[ValueRanges, Op], Range]] = {
    "add": _sum,
    "arange": _arange,
    "argmax": _argument,
    "argmin": _argument,
    "argsort": lambda ranges, op: Range(0, op.inputs[0].shape[named(op)["dim"]] - 1),
    "bucketize": _bucket,
    "cat": _joined,
    "clamp": _clamped,
    "cumsum": _counted,
    "div": _quotient,
    "floor_divide": _quotient,
    "full": _filled,
    "full_like": _filled,
    "mul": _times,
    "multinomial": _draw,
    "nonzero": _position,
    "ones": _filled,
    "ones_like": _filled,
    "remainder": _remainder,
    "searchsorted": _bucket,
    "stack": _joined,
    "sub": _sum,
    "where": _where,
    "zeros": _filled,
    "zeros_like": _filled,
}
