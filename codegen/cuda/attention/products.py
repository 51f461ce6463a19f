"""The two products of attention, of one warp: queries by keys, and weights by values."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.attention.key_tiles import PADDING, KeyTile
from moec.codegen.cuda.attention.softmax import Softmax
from moec.codegen.cuda.instructions import (
    load_fragments,
    load_transposed,
    multiply,
    round_pair,
)
from moec.codegen.specs.attention import AttentionSpec
from moec.dtypes import LONG_NAMES


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
