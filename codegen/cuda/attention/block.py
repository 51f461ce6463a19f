"""A block of attention on tensor cores: its rows, the keys that they attend to, and its copies from
global to shared memory.

A row is a query of one of the heads that share keys; heads run fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.attention.arguments import (
    LOWEST,
    Arguments,
    key_position,
    key_range,
    masked,
)
from moec.codegen.cuda.attention.key_tiles import PADDING, KeyTile
from moec.codegen.cuda.attention.softmax import LOG2_E
from moec.codegen.cuda.gemm.stages import PIECE
from moec.codegen.cuda.instructions import WARP, copy_async


@dataclass(frozen=True)
class ThreadBlock:
    """The block that computes the rows from `first` on of one key head; int64 except `thread`."""

    a: Arguments
    tile: KeyTile
    b: Expr
    kv: Expr
    first: Expr
    rows: Expr
    thread: Expr

    def query(self, row: Expr) -> tuple[Expr, Expr]:
        """The head and the index of the query of a row; of the last row beyond it."""
        row = T.min(row, self.rows - 1)
        group = self.a.spec.group
        return T.bind(self.kv * group + row % group), T.bind(row // group)

    def row(self, index: Expr) -> Expr:
        """The row of the index-th half fragment of this thread."""
        row = self.thread // WARP * (self.tile.fragments * 16) + index * 8 + self.thread % WARP // 4
        return self.first + T.cast(row, "int64")

    def keys(self, row: Expr) -> tuple[Expr, Expr]:
        """int32: the range of keys that a row attends to."""
        _, query = self.query(row)
        start, end = key_range(self.a, key_position(self.a, self.b, query))
        return T.bind(T.cast(start, "int32")), T.bind(T.cast(end, "int32"))


@dataclass(frozen=True)
class Ranges:
    """int32: the range of keys that each row of a thread attends to."""

    starts: Buffer
    ends: Buffer


def ranges_of(block: ThreadBlock) -> Ranges:
    count = block.tile.fragments * 2
    starts, ends = (T.alloc_buffer((count,), "int32", scope="local") for _ in range(2))
    with T.unroll(count) as index:
        start, end = block.keys(block.row(index))
        T.buffer_store(starts, start, [index])
        T.buffer_store(ends, end, [index])
    return Ranges(starts, ends)


def sink_of(block: ThreadBlock) -> Callable[[Expr], Expr] | None:
    sinks = block.a.sinks
    if sinks is None:
        return None
    return lambda row: T.cast(sinks[block.query(block.row(row))[0]], "float32") * T.float32(LOG2_E)


def scaled(block: ThreadBlock, score: Expr, row: Expr, key: Expr) -> Expr:
    """A score in base 2, with the mask."""
    a = block.a
    if a.mask is None:
        return score * T.float32(a.spec.scale * LOG2_E)
    inside = T.min(T.cast(key, "int64"), a.keys - 1)
    score = T.bind(score * T.float32(a.spec.scale))
    head, query = block.query(block.row(row))
    return masked(a, score, block.b, head, query, inside) * T.float32(LOG2_E)


def visible_score(ranges: Ranges, score: Expr, row: Expr, key: Expr) -> Expr:
    visible = T.And(key >= ranges.starts[row], key < ranges.ends[row])
    return T.if_then_else(visible, score, T.float32(LOWEST))


# ---- global to shared memory -----------------------------------------------------------


def load_queries(block: ThreadBlock, shared: Buffer) -> None:
    a, width = block.a, block.a.spec.key_dim
    with _pieces(block.thread, block.tile.threads, block.tile.rows, width) as (row, d):
        head, query = block.query(block.first + T.cast(row, "int64"))
        source = a.q.ptr_to(list(a.at("q", block.b, head, query, d)))
        copy_async(shared.ptr_to([row * (width + PADDING) + d]), source)


def load_keys(block: ThreadBlock, shared: Buffer, base: Expr, first: Expr, end: Expr) -> None:
    """Loads a tile of keys, and behind it one of values; zeros from `end` on."""
    a, rows = block.a, block.tile.keys
    for name, source, width in (("k", a.k, a.spec.key_dim), ("v", a.v, a.spec.value_dim)):
        with _pieces(block.thread, block.tile.threads, rows, width) as (row, d):
            key = T.bind(first + row)
            last = T.cast(T.min(key, end - 1), "int64")
            at = source.ptr_to(list(a.at(name, block.b, block.kv, last, d)))
            size = T.if_then_else(key < end, T.uint32(16), T.uint32(0))
            copy_async(shared.ptr_to([base + row * (width + PADDING) + d]), at, size)
        base = base + rows * (width + PADDING)


@contextmanager
def _pieces(thread: Expr, threads: int, rows: int, width: int) -> Iterator[tuple[Expr, Expr]]:
    """A loop over a thread's pieces of 16 bytes: (row, first element)."""
    count, across = rows * width // PIECE, width // PIECE
    with T.unroll(-(-count // threads)) as turn:
        i = T.bind(thread + turn * threads)
        row, d = T.bind(i // across), T.bind(i % across * PIECE)
        if count % threads:
            with T.If(i < count), T.Then():
                yield row, d
        else:
            yield row, d
