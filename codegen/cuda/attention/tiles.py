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

from functools import partial

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cuda.attention.arguments import Arguments, arguments, store_pair
from moec.codegen.cuda.attention.block import (
    ThreadBlock,
    load_keys,
    load_queries,
    ranges_of,
    scaled,
    sink_of,
    visible_score,
)
from moec.codegen.cuda.attention.key_tiles import (
    PADDING,
    STAGES,
    WARPS,
    KeyTile,
    key_tile,
)
from moec.codegen.cuda.attention.products import multiply_keys, multiply_values
from moec.codegen.cuda.attention.softmax import Softmax, divisor_of, first_of_row, softmax
from moec.codegen.cuda.instructions import WARP, barrier, commit_copies, wait_copies
from moec.codegen.specs.attention import AttentionSpec
from moec.dtypes import LONG_NAMES
from moec.target.cuda import CudaTarget


def tile_attention(
    spec: AttentionSpec, target: CudaTarget, name: str = "attention", tile: KeyTile | None = None
) -> PrimFunc:
    """The kernel (q, k, v, mask?, sinks?, first?, out). A query without visible keys gives zeros.
    `tile` None selects one.

    Raises NoMatch if no tile supports the spec.
    """
    tile = tile or key_tile(spec)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
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
