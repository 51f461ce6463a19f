"""Prefetching of weights while others are multiplied.

A core can have a few dozen outstanding loads, including those that its products wait for. So the
next weights are prefetched evenly: in each step of K, the share of elements that the rows being
multiplied are of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T


@dataclass(frozen=True)
class Stream:
    """At step k, `each` elements from element offset + k * each on, relative to a step of the
    packed weights of a tile."""

    group: Expr
    tile: Expr
    step: Expr | int
    offset: Expr | int
    each: Expr | int

    def at(self, k: Expr) -> list[Expr]:
        """The index of the first element that step k prefetches."""
        last = self.offset + k * self.each
        return [wide(self.group), wide(self.tile), wide(self.step), T.bind(last)]


@dataclass(frozen=True)
class Following:
    """The weights that are read next: those of a tile, from a step on, for as many steps of K as
    are multiplied meanwhile, from `begin` to before `end`."""

    group: Expr
    tile: Expr
    step: Expr | int
    begin: Expr | int
    end: Expr | int

    def share(self, before: Expr | int, rows: Expr | int, count: Expr, columns: int) -> Stream:
        """The share of the prefetching of `rows` of `count` rows, after the `before` first ones. A
        step has `columns` columns."""
        steps = self.end - self.begin
        each = T.bind(T.truncdiv(count + (rows * columns - 1), count))
        start = T.truncdiv(T.int64(columns) * before, count) * steps
        return Stream(self.group, self.tile, self.step, T.bind(start - self.begin * each), each)


def select_stream(condition: Expr, yes: Stream, no: Stream) -> Stream:
    """One of two streams, chosen at run time."""

    def chosen(name: str) -> Expr:
        return T.bind(T.Select(condition, wide(getattr(yes, name)), wide(getattr(no, name))))

    return Stream(*map(chosen, Stream.__dataclass_fields__))


def wide(value: Expr | int) -> Expr:
    return T.int64(value) if isinstance(value, int) else T.cast(value, "int64")
