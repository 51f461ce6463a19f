"""Attention on tensor cores: tiles of queries by tiles of keys. From sm_80 on.

    block     one key head of one text, and a tile of rows: the queries of all heads that share the
              key head, heads fastest, so that 16 queries of 8 heads fill 128 rows
    warp      16 or 32 rows, and all keys: no warp waits for the sums of another
    keys      tile after tile, loaded by cp.async while the tile before is multiplied

    scores[rows, keys] = q @ k^T    out = out * rescale + exp2(scores - top) @ v    by mma.sync

The softmax is computed online, in base 2, and its weights are rounded to 16 bits for the product
with v; their sum is not (Dao, FlashAttention-2, arXiv 2307.08691). The sums of a product have the
layout of a first factor (PTX ISA, mma.m16n8k16), so weights stay in registers.

Only keys that some row of the tile attends to are read. Among those, as in PyTorch, a NaN among
the values of a key that is masked for a row alone makes the row NaN. The last tiles of queries of
a text, which attend to most keys, are its first blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.attention.arguments import (
    LOWEST,
    Arguments,
    arguments,
    key_position,
    key_range,
    masked,
    store_pair,
)
from moec.codegen.cuda.attention.key_tiles import (
    PADDING,
    STAGES,
    WARPS,
    KeyTile,
    key_tile,
)
from moec.codegen.cuda.attention.softmax import LOG2_E, Softmax, divisor_of, first_of_row, softmax
from moec.codegen.cuda.gemm.stages import PIECE
from moec.codegen.cuda.instructions import (
    WARP,
    barrier,
    commit_copies,
    copy_async,
    kernel,
    load_fragments,
    load_transposed,
    multiply,
    round_pair,
    wait_copies,
)
from moec.codegen.specs.attention import AttentionSpec
from moec.dtypes import LONG_NAMES
from moec.target.cuda import CudaTarget

# A block of attention on tensor cores: its rows, the keys that they attend to, and its copies from
# global to shared memory.
#
# A row is a query of one of the heads that share keys; heads run fastest.


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


def tile_attention(
    spec: AttentionSpec, target: CudaTarget, name: str = "attention", tile: KeyTile | None = None
) -> PrimFunc:
    """The kernel (q, k, v, mask?, sinks?, first?, out). A query without visible keys gives zeros.
    `tile` None selects one.

    Raises NoMatch if no tile supports the spec.
    """
    tile = tile or key_tile(spec)
    with kernel(name, restrict=True) as builder:
        _launch(arguments(spec), tile)
    return builder.get()


def _launch(a: Arguments, tile: KeyTile) -> None:
    rows = a.queries * a.spec.group
    tiles = T.cast((rows + (tile.rows - 1)) // tile.rows, "int32")
    batch = T.cast(a.batch, "int32")
    across = T.launch_thread("blockIdx.x", T.max(tiles, 1))
    heads, texts = T.launch_thread("blockIdx.y", a.spec.kv_heads), T.max(batch, 1)
    with across as x, heads as y, T.launch_thread("blockIdx.z", texts) as z:
        with T.launch_thread("threadIdx.x", WARPS * WARP) as thread:
            with T.If(T.And(x < tiles, z < batch)), T.Then():
                first = T.bind(T.cast(tiles - 1 - x, "int64") * tile.rows)
                b, kv = T.cast(z, "int64"), T.cast(y, "int64")
                _attend(ThreadBlock(a, tile, b, kv, first, rows, thread))


def _attend(block: ThreadBlock) -> None:
    a, tile = block.a, block.tile
    spec, stage = a.spec, tile.stage(a.spec)
    memory = (tile.elements(spec),)
    shared = T.alloc_buffer(memory, LONG_NAMES[spec.dtype], scope="shared.dyn", align=128)
    start, first_end = block.keys(block.first)
    last_start, end = block.keys(block.first + (tile.rows - 1))
    steps = T.bind(T.max(end - start + (tile.keys - 1), 0) // tile.keys)
    ranges = ranges_of(block)

    def stage_of(step: Expr | int) -> Expr:
        return tile.rows * (spec.key_dim + PADDING) + step % STAGES * stage

    def load(step: Expr | int) -> None:
        load_keys(block, shared, stage_of(step), start + step * tile.keys, end)

    load_queries(block, shared)
    with T.If(steps > 0), T.Then():
        load(0)
    commit_copies()
    lane, warp = T.bind(block.thread % WARP), T.bind(block.thread // WARP)
    sums = softmax(tile, spec.value_dim, lane, sink_of(block))
    with T.serial(0, steps) as step:
        wait_copies(0)
        barrier()
        with T.If(step + 1 < steps), T.Then():
            load(step + 1)
        commit_copies()
        base, key = T.bind(stage_of(step)), T.bind(start + step * tile.keys)
        multiply_keys(spec, warp, shared, base, sums)
        sums.each(key, partial(scaled, block))
        with T.If(T.Or(key < last_start, key + tile.keys > first_end)), T.Then():
            sums.each(key, partial(visible_score, ranges))
        sums.add()
        values = T.bind(base + tile.keys * (spec.key_dim + PADDING))
        multiply_values(spec, shared, values, sums)
    _store(block, sums)


# ---- results ---------------------------------------------------------------------------


def _store(block: ThreadBlock, sums: Softmax) -> None:
    a, width = block.a, block.a.spec.value_dim
    with T.unroll(block.tile.fragments * 2) as row:
        divisor = divisor_of(sums.weight_sum(row))
        index = T.bind(block.row(row))
        head, query = block.query(index)
        with T.If(index < block.rows), T.Then(), T.unroll(width // 8) as u:
            first = first_of_row(row, width) + u * 4
            values = (sums.out[first] / divisor, sums.out[first + 1] / divisor)
            store_pair(a, block.b, head, query, u * 4 + sums.lane % 4, values)


def multiply_keys(
    spec: AttentionSpec, warp: Expr, shared: Buffer, base: Expr, sums: Softmax
) -> None:
    """scores = q @ k^T. The queries are the start of shared memory, a tile of keys is at `base`."""
    tile, lane = sums.tile, sums.lane
    depth, width = spec.key_dim, spec.key_dim + PADDING
    a, b = _fragments(tile)
    with T.unroll(int(sums.scores.shape[0])) as i:
        T.buffer_store(sums.scores, T.float32(0), [i])
    first = warp * (tile.fragments * 16)
    rows = T.bind((first + lane % 16) * width + lane // 16 * 8)
    keys = T.bind(base + (lane // 16 * 8 + lane % 8) * width + lane // 8 % 2 * 8)
    with T.unroll(depth // 16) as k:
        with T.unroll(tile.fragments) as t:
            fragment = [a[t * 4 + i] for i in range(4)]
            load_fragments(fragment, shared.ptr_to([rows + t * 16 * width + k * 16]))
        with T.unroll(tile.keys // 16) as u:
            at = shared.ptr_to([keys + u * 16 * width + k * 16])
            load_fragments([b[i] for i in range(4)], at)
            _multiply(spec, tile, sums.scores, tile.keys, u, (a, b))


def multiply_values(spec: AttentionSpec, shared: Buffer, base: Expr, sums: Softmax) -> None:
    """out += weights @ v, of the tile of values at `base`."""
    tile, lane = sums.tile, sums.lane
    width = spec.value_dim + PADDING
    a, b = _fragments(tile)
    values = T.bind(base + lane % 16 * width + lane // 16 * 8)
    with T.unroll(tile.keys // 16) as k:
        with T.unroll(tile.fragments) as t, T.unroll(4) as i:
            at = t * (tile.keys // 2) + k * 8 + i * 2
            pair = sums.scores[at], sums.scores[at + 1]
            round_pair(LONG_NAMES[spec.dtype], a[t * 4 + i], *pair)
        with T.unroll(spec.value_dim // 16) as u:
            at = shared.ptr_to([values + k * 16 * width + u * 16])
            load_transposed([b[i] for i in range(4)], at)
            _multiply(spec, tile, sums.out, spec.value_dim, u, (a, b))


def _fragments(tile: KeyTile) -> tuple[Buffer, Buffer]:
    """16 columns of all rows of a warp, and of 16 rows of the second factor."""
    a = T.alloc_buffer((tile.fragments * 4,), "uint32", scope="local")
    return a, T.alloc_buffer((4,), "uint32", scope="local")


def _multiply(
    spec: AttentionSpec,
    tile: KeyTile,
    sums: Buffer,
    columns: int,
    u: Expr,
    fragments: tuple[Buffer, Buffer],
) -> None:
    """Adds the products for the u-th 16 of `columns` columns."""
    a, b = fragments
    with T.unroll(tile.fragments) as t, T.unroll(2) as half:
        at = t * (columns // 2) + u * 8 + half * 4
        multiply(
            LONG_NAMES[spec.dtype],
            [sums[at + i] for i in range(4)],
            [a[t * 4 + i] for i in range(4)],
            [b[half * 2 + i] for i in range(2)],
        )
