"""Attention of few queries on tensor cores, the keys split over warps and blocks. From sm_80 on.

    block     one key head of one text, 16 rows (the queries of all heads that share it), and a part
              of the keys
    warp      all rows, and every fourth tile of 16 keys of the part, loaded by cp.async for itself

    out = sum over warps, then over blocks, each rescaled to the greatest score, in a fixed order

Keys and values are read once for all heads that share them. Each row's range of keys is divided,
not the room of the cache. If there is more than one part, a second launch adds them (partial.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.attention.arguments import LOWEST, Arguments, store_pair
from moec.codegen.cuda.attention.block import (
    ThreadBlock,
    load_keys,
    load_queries,
    ranges_of,
    scaled,
    sink_of,
    visible_score,
)
from moec.codegen.cuda.attention.key_tiles import PADDING, STAGES, KeyTile
from moec.codegen.cuda.attention.partial import count_parts, launch_combination, limit_of
from moec.codegen.cuda.attention.products import multiply_keys, multiply_values
from moec.codegen.cuda.attention.softmax import Softmax, divisor_of, each_of_row, softmax
from moec.codegen.cuda.instructions import (
    WARP,
    barrier,
    commit_copies,
    exp2,
    wait_copies,
    warp_barrier,
)
from moec.codegen.cuda.scan import each
from moec.dtypes import LONG_NAMES
from moec.target.cuda import CudaTarget


def launch_split_keys(a: Arguments, target: CudaTarget, tile: KeyTile) -> None:
    """Launches attention for any number of queries, with memory for parts of them."""
    parts = T.bind(count_parts(a, target, least=tile.warps * tile.keys))
    _launch(a, tile, parts)
    with T.If(parts > 1), T.Then():
        launch_combination(a, parts)


def _launch(a: Arguments, tile: KeyTile, parts: Expr) -> None:
    rows = a.queries * a.spec.group
    tiles = T.cast((rows + (tile.rows - 1)) // tile.rows, "int32")
    batch = T.cast(a.batch, "int32")
    across = T.launch_thread("blockIdx.x", parts)
    heads = T.launch_thread("blockIdx.y", T.max(tiles, 1) * a.spec.kv_heads)
    texts = T.launch_thread("blockIdx.z", T.max(batch, 1))
    with across as part, heads as y, texts as z:
        with T.launch_thread("threadIdx.x", tile.threads) as thread:
            kv, first = y % a.spec.kv_heads, y // a.spec.kv_heads
            with T.If(T.And(first < tiles, z < batch)), T.Then():
                row = T.bind(T.cast(first, "int64") * tile.rows)
                b, kv = T.cast(z, "int64"), T.bind(T.cast(kv, "int64"))
                block = ThreadBlock(a, tile, b, kv, row, rows, thread)
                sums, shared = _attend(block, part, parts)
                _store(block, _joined(block, sums, shared), part, parts)


def _attend(block: ThreadBlock, part: Expr, parts: Expr) -> tuple[Softmax, Buffer]:
    """The sums of each warp over its keys, and the memory that no warp reads any more."""
    a, tile = block.a, block.tile
    spec, stage = a.spec, tile.stage(a.spec)
    memory = (tile.elements(spec),)
    shared = T.alloc_buffer(memory, LONG_NAMES[spec.dtype], scope="shared.dyn", align=128)
    lane, warp = T.bind(block.thread % WARP), T.bind(block.thread // WARP)
    start, first_end = block.keys(block.first)
    last_start, end = block.keys(block.first + (tile.rows - 1))
    count = T.bind((T.max(end - start, 0) + (tile.keys - 1)) // tile.keys)
    share = T.bind(T.truncdiv(count + parts - 1, parts))
    first = T.bind(part * share + warp)
    last = T.min(part * share + share, count)
    steps = T.bind(T.max(last - first + (tile.warps - 1), 0) // tile.warps)
    ranges = ranges_of(block)

    def stage_of(step: Expr | int) -> Expr:
        return tile.rows * (spec.key_dim + PADDING) + (warp * STAGES + step % STAGES) * stage

    def load(step: Expr | int) -> None:
        key = T.bind(start + (first + step * tile.warps) * tile.keys)
        load_keys(block, shared, stage_of(step), key, end)

    load_queries(block, shared)
    with T.If(steps > 0), T.Then():
        load(0)
    commit_copies()
    wait_copies(0)
    barrier()
    sums = softmax(tile, spec.value_dim, lane, _sink(block, T.And(part == 0, warp == 0)))
    with T.serial(0, steps) as step:
        wait_copies(0)
        warp_barrier()
        with T.If(step + 1 < steps), T.Then():
            load(step + 1)
        commit_copies()
        base = T.bind(stage_of(step))
        key = T.bind(start + (first + step * tile.warps) * tile.keys)
        multiply_keys(spec, block.row_warp, shared, base, sums)
        sums.each(key, partial(scaled, block))
        with T.If(T.Or(key < last_start, key + tile.keys > first_end)), T.Then():
            sums.each(key, partial(visible_score, ranges))
        sums.add()
        values = T.bind(base + tile.keys * (spec.key_dim + PADDING))
        multiply_values(spec, shared, values, sums)
    wait_copies(0)
    barrier()
    return sums, shared


def _sink(block: ThreadBlock, counts: Expr) -> Callable[[Expr], Expr] | None:
    """The sink of a row, where it counts; elsewhere no logit."""
    sink = sink_of(block)
    if sink is None:
        return None
    return lambda row: T.if_then_else(counts, sink(row), T.float32(LOWEST))


@dataclass(frozen=True)
class _Joined:
    """The sums of the warps of a block in shared memory, [warp, row(, feature)], and the factors
    that rescale them to the row's greatest score."""

    warps: int
    tops: Buffer
    totals: Buffer
    floats: Buffer
    scales: Buffer

    def best(self, row: Expr) -> Expr:
        best = self.tops[0, row]
        for warp in range(1, self.warps):
            best = T.call_extern("float32", "fmaxf", best, self.tops[warp, row])
        return T.bind(best)

    def added(self, row: Expr, term: Buffer, *at: Expr) -> Expr:
        """The sum over the warps, in their order."""
        value = self.scales[0, row] * term[(0, row, *at)]
        for warp in range(1, self.warps):
            value = value + self.scales[warp, row] * term[(warp, row, *at)]
        return T.bind(value)


def _joined(block: ThreadBlock, sums: Softmax, shared: Buffer) -> _Joined:
    tile, width = block.tile, block.a.spec.value_dim
    size = (tile.warps, tile.rows, width + PADDING)
    floats = T.decl_buffer(size, "float32", data=shared.data, scope="shared.dyn")
    tops, totals, scales = (T.alloc_buffer(size[:2], "float32", scope="shared") for _ in range(3))
    joined = _Joined(tile.warps, tops, totals, floats, scales)
    lane, warp = sums.lane, T.bind(block.thread // WARP)
    with T.unroll(sums.rows) as index:
        row, total = T.bind(index * 8 + lane // 4), sums.weight_sum(index)
        with T.If(lane % 4 == 0), T.Then():
            T.buffer_store(tops, sums.top[index], [warp, row])
            T.buffer_store(totals, total, [warp, row])
        with each_of_row(index, width) as (at, column):
            T.buffer_store(floats, sums.out[at], [warp, row, column + lane % 4 * 2])
    barrier()

    def weigh(i: Expr) -> None:
        w, row = T.bind(i // tile.rows), T.bind(i % tile.rows)
        T.buffer_store(scales, exp2(tops[w, row] - limit_of(joined.best(row))), [w, row])

    each(tile.warps * tile.rows, tile.threads, block.thread, weigh)
    barrier()
    return joined


def _store(block: ThreadBlock, joined: _Joined, part: Expr, parts: Expr) -> None:
    """Stores results if there is one part, else this part of them."""
    a, tile, width, memory = block.a, block.tile, block.a.spec.value_dim, block.a.memory
    assert memory is not None
    before, across = T.bind((block.b * a.spec.kv_heads + block.kv) * block.rows), width // 2
    with T.serial(0, -(-tile.rows * across // tile.threads)) as turn:
        i = T.bind(turn * tile.threads + block.thread)
        row, pair = T.bind(i // across), T.bind(i % across)
        index = T.bind(block.first + T.cast(row, "int64"))
        with T.If(T.And(row < tile.rows, index < block.rows)), T.Then():
            low, high = (joined.added(row, joined.floats, pair * 2 + i) for i in range(2))
            total = joined.added(row, joined.totals)
            with T.If(parts > 1):
                with T.Then():
                    slot = T.bind((before + index) * T.cast(parts, "int64") + part)
                    T.buffer_store(memory, low, [slot, pair * 2])
                    T.buffer_store(memory, high, [slot, pair * 2 + 1])
                    with T.If(pair == 0), T.Then():
                        T.buffer_store(memory, joined.best(row), [slot, width])
                        T.buffer_store(memory, total, [slot, width + 1])
                with T.Else():
                    divisor = divisor_of(total)
                    head, query = block.query(index)
                    store_pair(a, block.b, head, query, pair, (low / divisor, high / divisor))
