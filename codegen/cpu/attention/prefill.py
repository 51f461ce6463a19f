"""Attention for many query rows: pack keys and values once, then tiles of rows over blocks.

Keys are transposed as they are packed, so that a vector holds one feature of many keys; keys and
values are padded to full blocks. A task computes some rows of one key head (for all query heads
that share it, so that a block is read once for them). It loops over the blocks and keeps for each
row the greatest score, the sum, and the weighted values so far (online softmax).

On a CPU with bf16 dot products, bf16 inputs stay bf16: two features of a key, or two keys of a
feature, share one int32 lane. Otherwise everything is converted to float32 as it is packed.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu import parallel
from moec.codegen.cpu.attention.problem import (
    MINUS_INFINITY,
    UNITS,
    Problem,
    Scratch,
    factor,
    finite,
    load_mask,
    multiply,
    reach,
    scaled,
    start,
    write_row,
)
from moec.codegen.cpu.llvm.amx import TILE_ROWS
from moec.codegen.cpu.parallel import ELEMENT, divide

TILE = 96  # rows of a task: a multiple of a register tile; their queries and sums stay in L2


@dataclass(frozen=True)
class PackedKeysValues:
    """keys[head, block, unit, key] and values[head, block, unit, feature], units of `dtype`."""

    problem: Problem
    pairs: bool
    keys: Buffer
    values: Buffer
    blocks: Expr

    @property
    def dtype(self) -> str:
        return "int32" if self.pairs else "float32"

    @property
    def per_unit(self) -> int:
        return 2 if self.pairs else 1

    @property
    def block(self) -> int:
        """Keys of a block: as many as a register tile has columns, so that scores stay in
        registers."""
        return block_size(self.problem)

    @property
    def amx(self) -> bool:
        """Whether AMX is used: units of features fill tile registers."""
        return self.pairs and self.problem.vector.target.bf16_tiles and self.key_units % UNITS == 0

    @property
    def height(self) -> int:
        """Rows of a register tile."""
        return TILE_ROWS if self.amx else self.problem.vector.target.tile_rows

    @property
    def key_units(self) -> int:
        return self.problem.spec.key_dim // self.per_unit

    def multiply_add(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        v = self.problem.vector
        return v.dot2(acc, a, b) if self.pairs else v.fma(a, b, acc)


@dataclass(frozen=True)
class QueryTile:
    """Rows of one key head from `first` on, and the running softmax of each."""

    head: Expr
    first: Expr
    query: Buffer  # [row, unit]
    sums: Buffer  # [row, feature]: weights @ values
    tops: Buffer  # [row]: the greatest score
    totals: Buffer  # [row, lane]: the sum of the weights
    starts: Buffer | None  # [row]: the first key that it may attend to; None: 0
    reaches: Buffer  # [row]: the end of the keys that it may attend to
    bias: Buffer | None  # [row of a register tile, key of a block]: its mask


def block_size(p: Problem) -> int:
    return p.vector.target.tile_vectors * p.vector.lanes


def tiled(p: Problem) -> None:
    """Fill p.out."""
    spec, v = p.spec, p.vector
    pairs = v.target.bf16_dot and spec.dtype == "bf16" and spec.key_dim % 2 == 0
    per_unit, dtype = (2, "int32") if pairs else (1, "float32")
    block = block_size(p)
    blocks = T.bind(T.ceildiv(p.keys, block))
    keys = T.alloc_buffer((p.heads, blocks, spec.key_dim // per_unit, block), dtype)
    values = T.alloc_buffer((p.heads, blocks, block // per_unit, p.width), dtype)
    packed = PackedKeysValues(p, pairs, keys, values, blocks)
    with parallel.parallel_for(p.heads * blocks, p.heads * p.keys * (p.features * ELEMENT)) as task:
        head, n = divide(task, blocks)
        end = p.end(head)
        with T.If(n * block < end), T.Then():
            _pack_keys(packed, head, n, end)
            with T.If((n + 1) * block <= end):
                with T.Then():
                    _pack_values(packed, head, n, end, full_block=True)
                with T.Else():
                    _pack_values(packed, head, n, end, full_block=False)

    tiles = T.bind(T.ceildiv(p.rows, TILE))
    with parallel.parallel_for(p.heads * tiles, p.heads * p.rows * p.keys * p.features) as task:
        head, n = divide(task, tiles)
        if spec.is_causal:  # late tiles see more keys: take turns, so that threads get alike
            half = T.floordiv(n, 2)
            n = T.bind(T.Select(T.floormod(n, 2) == 0, half, tiles - 1 - half))
        _tile(packed, head, n * TILE)


def _pack_keys(c: PackedKeysValues, head: Expr, n: Expr, end: Expr) -> None:
    """Keys after the last are copies of it: they are masked later."""
    p = c.problem
    b, kv = p.split(head)
    with T.serial(0, c.block) as j:
        key = T.bind(T.min(n * c.block + j, end - 1))
        with T.serial(0, c.key_units) as d:
            index = p.at("k", b, kv, key, d * c.per_unit)
            x = p.vector.pair(p.k, index) if c.pairs else p.vector.scalar(p.k, index)
            T.buffer_store(c.keys, x, [head, n, d, j])


def _pack_values(c: PackedKeysValues, head: Expr, n: Expr, end: Expr, full_block: bool) -> None:
    """Keys after the last are zeros: their weight is 0, but 0 times NaN is not."""
    p, v = c.problem, c.problem.vector
    b, kv = p.split(head)
    with T.serial(0, c.block // c.per_unit) as unit:
        for d in range(0, p.width, v.lanes):
            features = min(v.lanes, p.spec.value_dim - d)

            def read(i: int, d: int = d, features: int = features) -> Expr:
                key = n * c.block + unit * c.per_unit + i
                index = p.at("v", b, kv, key, d)
                if full_block and features == v.lanes:
                    return v.load(p.v, index)
                count = T.Select(key < end, T.int32(features), T.int32(0))
                return v.load_tail(p.v, index, count)

            x = read(0)
            if c.pairs:
                # A bf16 is the upper half of its float32.
                low = T.reinterpret(f"uint32x{v.lanes}", x)
                high = T.reinterpret(f"uint32x{v.lanes}", read(1))
                sixteen = T.broadcast(T.uint32(16), v.lanes)
                both = T.bitwise_or(high, T.shift_right(low, sixteen))
                x = T.reinterpret(f"int32x{v.lanes}", both)
            T.buffer_store(c.values, x, [head, n, unit, T.ramp(d, 1, v.lanes)])


def _tile(c: PackedKeysValues, head: Expr, first: Expr) -> None:
    """Rows first .. first + TILE of one key head against all of its keys."""
    p, v, height = c.problem, c.problem.vector, c.height
    lane = T.ramp(0, 1, v.lanes)
    used_rows = T.bind(T.min(p.rows - first, TILE))
    groups = T.bind(T.ceildiv(used_rows, height))
    query = v.scratch((TILE, c.key_units), c.dtype)
    sums = v.scratch((TILE, p.width), "float32")
    tops = T.alloc_buffer((TILE,), "float32")
    totals = T.alloc_buffer((TILE, v.lanes), "float32")
    reaches = T.alloc_buffer((TILE,), "int64")
    limited = p.spec.window is not None or p.spec.chunk is not None
    starts = T.alloc_buffer((TILE,), "int64") if limited else None
    bias = T.alloc_buffer((height, c.block), "float32") if p.mask is not None else None
    with T.serial(0, groups * height) as r:
        # Rows after the last are copies of it: computed, never written out.
        b, h, s = p.query_at(head, T.bind(T.min(first + r, p.rows - 1)))
        with T.serial(0, c.key_units) as d:
            index = p.at("q", b, h, s, d * c.per_unit)
            x = v.pair(p.q, index) if c.pairs else v.scalar(p.q, index)
            T.buffer_store(query, x, [r, d])
        with T.serial(0, p.width // v.lanes) as d:
            T.buffer_store(sums, v.splat(0.0), [r, T.ramp(d * v.lanes, 1, v.lanes)])
        T.buffer_store(tops, T.float32(MINUS_INFINITY), [r])
        T.buffer_store(totals, v.splat(0.0), [r, lane])
        T.buffer_store(reaches, reach(p, b, s), [r])
        if starts is not None:
            T.buffer_store(starts, start(p, b, s), [r])

    tile = QueryTile(head, first, query, sums, tops, totals, starts, reaches, bias)
    scratch = Scratch.of(v, c.block) if c.amx else None
    if c.amx:
        v.tiles("begin")

    def group_of(n: Expr, r: Expr) -> None:
        if scratch is None:
            _group(c, tile, n, r)
        else:
            _group_amx(c, tile, n, r, scratch)

    # Rows are ordered by position: the last reaches furthest. (Blocks before the first start are
    # passed over one by one: a loop from there takes TVM a minute to analyse.)
    stop = T.ceildiv(reaches[used_rows - 1], c.block)
    with T.serial(0, stop) as n, T.serial(0, groups) as group:
        r = T.bind(group * height)
        near = reaches[r + height - 1] > n * c.block
        if starts is not None:
            near = T.And(near, starts[r] < (n + 1) * c.block)
        with T.If(near), T.Then():
            if bias is None:
                group_of(n, r)
            else:
                with T.If(_open(c, tile, bias, n, r)), T.Then():
                    group_of(n, r)
    if c.amx:
        v.tiles("end")

    with T.serial(0, used_rows) as r:
        at = p.query_at(head, first + r)
        f = v.splat(factor(p, tops[r], v.sum(totals[r, lane]), at[1]))
        with T.serial(0, p.width // v.lanes) as d:
            lanes = T.ramp(d * v.lanes, 1, v.lanes)
            T.buffer_store(sums, sums[r, lanes] * f, [r, lanes])
        write_row(p, at, sums, r)


def _open(c: PackedKeysValues, tile: QueryTile, bias: Buffer, n: Expr, r: Expr) -> Expr:
    """Load the mask of a register tile. Returns whether any row attends to a key of the block."""
    p, v = c.problem, c.problem.vector
    lane, vectors = T.ramp(0, 1, v.lanes), c.block // v.lanes
    greatest = T.alloc_buffer((v.lanes,), "float32")
    T.buffer_store(greatest, v.splat(MINUS_INFINITY), [lane])
    with T.serial(0, c.height) as i:
        row = T.bind(T.min(tile.first + r + i, p.rows - 1))
        load_mask(p, (*p.query_at(tile.head, row), n * c.block), bias, i, vectors)
        with T.serial(0, vectors) as j:
            x = bias[i, T.ramp(j * v.lanes, 1, v.lanes)]
            T.buffer_store(greatest, T.max(x, greatest[lane]), [lane])
    return p.soft.top(greatest[lane]) > T.float32(MINUS_INFINITY)


def _group(c: PackedKeysValues, tile: QueryTile, n: Expr, r: Expr) -> None:
    """One register tile of rows, from r, against one block of keys."""
    v = c.problem.vector
    lane = T.ramp(0, 1, v.lanes)
    scores = _scores(c, tile.query, (tile.head, n), r)
    scales: list[Expr] = []
    weights: list[Buffer] = []
    for i, row in enumerate(scores):
        lanes = _lanes(c, tile, n, r, i, [x[lane] for x in row])
        weights.append(T.alloc_buffer((c.block // c.per_unit,), c.dtype))
        scales.append(_soften(c, lanes, tile.tops, tile.totals, r + i, weights[i], ()))
    _accumulate(c, tile.sums, (tile.head, n), r, scales, weights)


def _lanes(
    c: PackedKeysValues, tile: QueryTile, n: Expr, r: Expr, i: int | Expr, row: list[Expr]
) -> list[Expr]:
    """The scaled scores of row r + i, -inf for keys that it may not attend to."""
    v = c.problem.vector
    visible = T.bind(T.cast(tile.reaches[r + i] - n * c.block, "int32"))
    unseen = None
    if tile.starts is not None:
        unseen = T.bind(T.cast(T.max(tile.starts[r + i] - n * c.block, 0), "int32"))
    lanes = []
    for j, x in enumerate(row):
        added = None
        if tile.bias is not None:
            added = tile.bias[i, T.ramp(j * v.lanes, 1, v.lanes)]
        before = None if unseen is None else unseen - j * v.lanes
        lanes.append(scaled(c.problem, x, before, visible - j * v.lanes, added))
    return lanes


def _group_amx(c: PackedKeysValues, tile: QueryTile, n: Expr, r: Expr, scratch: Scratch) -> None:
    """As _group, for 16 rows on tile registers."""
    v, at, width = c.problem.vector, (tile.head, n), c.problem.width
    multiply(
        v,
        lambda u: tile.query[r, u], c.key_units, c.key_units,
        lambda u, j: c.keys[(*at, u, j * v.lanes)], c.block,
        lambda j: scratch.scores[0, j * v.lanes], c.block // v.lanes, added=False,
    )  # fmt: skip
    with T.serial(0, TILE_ROWS) as i:
        row = [
            T.bind(scratch.scores[i, T.ramp(j * v.lanes, 1, v.lanes)])
            for j in range(c.block // v.lanes)
        ]
        lanes = _lanes(c, tile, n, r, i, row)
        scale = _soften(c, lanes, tile.tops, tile.totals, r + i, scratch.weights, (i,))
        for d in range(0, width, v.lanes):
            features = T.ramp(d, 1, v.lanes)
            T.buffer_store(tile.sums, tile.sums[r + i, features] * scale, [r + i, features])
    multiply(
        v,
        lambda u: scratch.weights[0, u], c.block // 2, c.block // 2,
        lambda u, j: c.values[(*at, u, j * v.lanes)], width,
        lambda j: tile.sums[r, j * v.lanes], width // v.lanes, added=True,
    )  # fmt: skip


def _scores(
    c: PackedKeysValues, query: Buffer, block: tuple[Expr, ...], r: Expr
) -> list[list[Buffer]]:
    """The accumulators of a register tile that hold q @ k.T."""
    v = c.problem.vector
    lane = T.ramp(0, 1, v.lanes)
    height, vectors = v.target.tile_rows, c.block // v.lanes
    acc = [[T.alloc_buffer((v.lanes,), "float32") for _ in range(vectors)] for _ in range(height)]
    for a in (a for row in acc for a in row):
        T.buffer_store(a, v.splat(0.0), [lane])
    with T.serial(0, c.key_units) as d:
        keys = [
            T.bind(c.keys[(*block, d, T.ramp(j * v.lanes, 1, v.lanes))]) for j in range(vectors)
        ]
        for i in range(height):
            q = T.bind(T.broadcast(query[r + i, d], v.lanes))
            for a, k in zip(acc[i], keys, strict=True):
                T.buffer_store(a, c.multiply_add(a[lane], q, k), [lane])
    return acc


def _soften(
    c: PackedKeysValues,
    scores: list[Expr],
    tops: Buffer,
    totals: Buffer,
    r: Expr,
    weights: Buffer,
    row: tuple[Expr, ...],
) -> Expr:
    """Update a row's greatest score and sum, and write weights[row] of these keys as units. Returns
    the factor that rescales all sums so far."""
    v, soft = c.problem.vector, c.problem.soft
    lane = T.ramp(0, 1, v.lanes)
    top = scores[0]
    for x in scores[1:]:
        top = T.max(top, x)
    old = T.bind(tops[r])
    new = T.bind(T.max(soft.top(top), old))
    T.buffer_store(tops, new, [r])
    base = finite(new)
    scale = soft.exp(v.splat(old - base))
    total = totals[r, lane] * scale
    units = v.lanes // c.per_unit
    for j, x in enumerate(scores):
        weight = soft.exp(x - v.splat(base))
        total = total + weight
        unit = soft.round_pairs(weight) if c.pairs else weight
        T.buffer_store(weights, unit, [*row, T.ramp(j * units, 1, units)])
    T.buffer_store(totals, total, [r, lane])
    return scale


def _accumulate(
    c: PackedKeysValues,
    sums: Buffer,
    block: tuple[Expr, ...],
    r: Expr,
    scales: list[Expr],
    weights: list[Buffer],
) -> None:
    """sums = sums * scale + weights @ values"""
    v = c.problem.vector
    lane = T.ramp(0, 1, v.lanes)
    step = v.target.tile_vectors * v.lanes
    for first in range(0, c.problem.width, step):
        stop = min(first + step, c.problem.width)
        ramps = [T.ramp(d, 1, v.lanes) for d in range(first, stop, v.lanes)]
        acc = [[T.alloc_buffer((v.lanes,), "float32") for _ in ramps] for _ in scales]
        for i, scale in enumerate(scales):
            for a, ramp in zip(acc[i], ramps, strict=True):
                T.buffer_store(a, sums[r + i, ramp] * scale, [lane])
        with T.serial(0, c.block // c.per_unit) as unit:
            values = [T.bind(c.values[(*block, unit, ramp)]) for ramp in ramps]
            for i, weight in enumerate(weights):
                w = T.bind(T.broadcast(weight[unit], v.lanes))
                for a, x in zip(acc[i], values, strict=True):
                    T.buffer_store(a, c.multiply_add(a[lane], w, x), [lane])
        for i in range(len(scales)):
            for a, ramp in zip(acc[i], ramps, strict=True):
                T.buffer_store(sums, a[lane], [r + i, ramp])
