"""Attention for few query rows, as when one token is generated: nothing is packed.

The time is that of reading keys and values, so they are read once, without packing: vectors run
along the features of a key, and the dot products of `lanes` keys are summed together. Keys are
divided into chunks, so that one long sequence keeps all cores busy; a second step combines the
chunks of a row. Chunks do not depend on the number of threads, and so neither do sums; nor do they
on the other rows, so that tokens which are verified together have the bits of one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu import parallel
from moec.codegen.cpu.attention.problem import (
    MINUS_INFINITY,
    Problem,
    factor,
    finite,
    load_mask,
    reach,
    scaled,
    start,
    write_row,
)
from moec.codegen.cpu.parallel import ELEMENT, bytes_of, divide

FEW = 24  # rows of one key head for which packing does not pay; a multiple of 4
VERIFIED = 8  # queries that never take more rows than that, in blocks of FEW
CHUNK = 256  # keys of a task


@dataclass(frozen=True)
class PartialSoftmax:
    """The softmax of each row over one chunk of keys; `sums` are weights @ values."""

    tops: Buffer  # [block, chunk, row]
    totals: Buffer  # [block, chunk, row]
    sums: Buffer  # [block, chunk, row, feature]


@dataclass(frozen=True)
class RowBlock:
    """Some rows of one key head, at most FEW: `count` from `first` on."""

    number: Expr
    head: Expr
    first: Expr
    count: Expr


def takes(group: int) -> int:
    """The most queries of which each has `group` rows that `few` takes; 0: none."""
    return 0 if group > FEW else max(FEW // group, VERIFIED)


def few(p: Problem) -> None:
    """Fill p.out; at most `takes` queries."""
    rows = FEW // p.spec.group * p.spec.group
    chunks, blocks = T.bind(T.ceildiv(p.keys, CHUNK)), T.bind(T.ceildiv(p.rows, rows))
    count = T.bind(p.heads * blocks)
    parts = PartialSoftmax(
        T.alloc_buffer((count, chunks, FEW), "float32"),
        T.alloc_buffer((count, chunks, FEW), "float32"),
        T.alloc_buffer((count, chunks, FEW, p.width), "float32"),
    )
    sums = p.heads * p.rows * p.keys * p.features
    cached = count * p.keys * (p.features * bytes_of(p.k))
    with parallel.parallel_for(count * chunks, sums, cached) as task:
        number, n = divide(task, chunks)
        head, index = divide(number, blocks)
        first = T.bind(index * rows)
        end = p.end(head)
        with T.If(n * CHUNK < end), T.Then():
            block = RowBlock(number, head, first, T.bind(T.min(p.rows - first, rows)))
            _chunk(p, parts, block, n, end)
    with parallel.parallel_for(
        p.heads * p.rows, p.heads * p.rows * chunks * (p.width * ELEMENT)
    ) as task:
        head, row = divide(task, p.rows)
        index, within = divide(row, T.int64(rows))
        at = (T.bind(head * blocks + index), within)
        _join(p, parts, p.query_at(head, row), at, T.bind(T.ceildiv(p.end(head), CHUNK)))


def _chunk(p: Problem, parts: PartialSoftmax, block: RowBlock, n: Expr, end: Expr) -> None:
    v, soft = p.vector, p.soft
    first = T.bind(n * CHUNK)
    left = T.bind(T.min(end - first, CHUNK))
    groups = T.bind(T.ceildiv(left, v.lanes))
    scores = T.alloc_buffer((FEW, CHUNK), "float32")
    reaches = T.alloc_buffer((FEW,), "int64")
    bias = T.alloc_buffer((FEW, CHUNK), "float32") if p.mask is not None else None
    with T.serial(0, block.count) as r:
        where = p.query_at(block.head, block.first + r)
        T.buffer_store(reaches, reach(p, where[0], where[2]), [r])
        if bias is not None:
            load_mask(p, (*where, first), bias, r, groups)
    dots = _dots(p, block)
    with T.serial(0, groups) as group, T.serial(0, block.count) as r:
        key = T.bind(first + group * v.lanes)
        lanes = T.ramp(group * v.lanes, 1, v.lanes)
        visible = T.cast(reaches[r] - key, "int32")
        added = None if bias is None else bias[r, lanes]
        batch, _, position = p.query_at(block.head, block.first + r)
        first_seen = start(p, batch, position)
        unseen = None if first_seen is None else T.cast(first_seen - key, "int32")
        T.buffer_store(scores, scaled(p, dots(r, key), unseen, visible, added), [r, lanes])

    with T.serial(0, block.count) as r:
        state = T.alloc_buffer((v.lanes,), "float32")
        lane = T.ramp(0, 1, v.lanes)
        T.buffer_store(state, v.splat(MINUS_INFINITY), [lane])
        with T.serial(0, groups) as group:
            x = scores[r, T.ramp(group * v.lanes, 1, v.lanes)]
            T.buffer_store(state, T.max(x, state[lane]), [lane])
        top = soft.top(state[lane])
        base = finite(top)
        T.buffer_store(state, v.splat(0.0), [lane])
        with T.serial(0, groups) as group:
            lanes = T.ramp(group * v.lanes, 1, v.lanes)
            weight = soft.exp(scores[r, lanes] - v.splat(base))
            T.buffer_store(scores, weight, [r, lanes])
            T.buffer_store(state, state[lane] + weight, [lane])
        T.buffer_store(parts.tops, top, [block.number, n, r])
        T.buffer_store(parts.totals, v.sum(state[lane]), [block.number, n, r])
    _weigh(p, parts, (block, n), scores, first, left)


def _dots(p: Problem, block: RowBlock) -> Callable[[Expr, Expr], Expr]:
    """A function of a row and a key: the products of that row with the next `lanes` keys."""
    v, spec = p.vector, p.spec
    lane = T.ramp(0, 1, v.lanes)
    step = 2 * v.lanes
    pairs = v.target.bf16_dot and spec.dtype == "bf16" and spec.key_dim % step == 0
    if pairs:
        query = T.alloc_buffer((FEW, spec.key_dim // 2), "int32")
        keys = T.decl_buffer((*p.k.shape[:3], spec.key_dim // 2), "int32", data=p.k.data)
        full_vectors, rest = divmod(spec.key_dim // 2, v.lanes)
    else:
        full_vectors, rest = divmod(spec.key_dim, v.lanes)
        query = T.alloc_buffer((FEW, (full_vectors + (rest > 0)) * v.lanes), "float32")
        keys = p.k
    with T.serial(0, block.count) as r:
        b, h, s = p.query_at(block.head, block.first + r)
        with T.serial(0, full_vectors) as d:
            lanes = T.ramp(d * v.lanes, 1, v.lanes)
            if pairs:
                source = T.decl_buffer((*p.q.shape[:3], spec.key_dim // 2), "int32", data=p.q.data)
                T.buffer_store(query, source[p.at("q", b, h, s, lanes)], [r, lanes])
            else:
                T.buffer_store(query, v.load(p.q, p.at("q", b, h, s, d * v.lanes)), [r, lanes])
        if rest:
            d = full_vectors * v.lanes
            x = v.load_tail(p.q, p.at("q", b, h, s, d), T.int32(rest))
            T.buffer_store(query, x, [r, T.ramp(d, 1, v.lanes)])
    b, kv = p.split(block.head)

    def dots(r: Expr, first: Expr) -> Expr:
        acc = [T.alloc_buffer((v.lanes,), "float32") for _ in range(v.lanes)]
        # Keys after the last are copies of it: they are masked later.
        near = [T.bind(T.min(first + j, p.keys - 1)) for j in range(v.lanes)]
        for a in acc:
            T.buffer_store(a, v.splat(0.0), [lane])
        with T.serial(0, full_vectors) as d:
            lanes = T.ramp(d * v.lanes, 1, v.lanes)
            q = T.bind(query[r, lanes])
            for a, key in zip(acc, near, strict=True):
                if pairs:
                    x = v.dot2(a[lane], q, keys[p.at("k", b, kv, key, lanes)])
                else:
                    x = v.fma(q, v.load(keys, p.at("k", b, kv, key, d * v.lanes)), a[lane])
                T.buffer_store(a, x, [lane])
        if rest:
            d = full_vectors * v.lanes
            q = T.bind(query[r, T.ramp(d, 1, v.lanes)])
            for a, key in zip(acc, near, strict=True):
                k = v.load_tail(keys, p.at("k", b, kv, key, d), T.int32(rest))
                T.buffer_store(a, v.fma(q, k, a[lane]), [lane])
        return p.soft.sums([a[lane] for a in acc])

    return dots


def _weigh(
    p: Problem,
    parts: PartialSoftmax,
    at: tuple[RowBlock, Expr],
    weights: Buffer,
    first: Expr,
    left: Expr,
) -> None:
    """parts.sums = weights @ values, for some rows at a time."""
    v = p.vector
    lane = T.ramp(0, 1, v.lanes)
    block, n = at
    b, kv = p.split(block.head)
    height = min(4, p.spec.group)
    vectors = min(8, v.target.vector_registers // 2 // height)
    with T.serial(0, T.ceildiv(block.count, height)) as tile:
        r = T.bind(tile * height)  # the sums of rows after the last are not used
        for start in range(0, p.width, vectors * v.lanes):
            features = range(start, min(start + vectors * v.lanes, p.width), v.lanes)
            acc = [[T.alloc_buffer((v.lanes,), "float32") for _ in features] for _ in range(height)]
            for a in (a for row in acc for a in row):
                T.buffer_store(a, v.splat(0.0), [lane])
            with T.serial(0, left) as j:
                values = [_value(p, p.at("v", b, kv, first + j, d), d) for d in features]
                for i in range(height):
                    w = T.bind(v.splat(weights[r + i, j]))
                    for a, x in zip(acc[i], values, strict=True):
                        T.buffer_store(a, v.fma(w, x, a[lane]), [lane])
            for i in range(height):
                for a, d in zip(acc[i], features, strict=True):
                    index = [block.number, n, r + i, T.ramp(d, 1, v.lanes)]
                    T.buffer_store(parts.sums, a[lane], index)


def _value(p: Problem, index: tuple[Expr, ...], feature: int) -> Expr:
    rest = p.spec.value_dim - feature
    if rest >= p.vector.lanes:
        return p.vector.load(p.v, index)
    return p.vector.load_tail(p.v, index, T.int32(rest))


def _join(
    p: Problem,
    parts: PartialSoftmax,
    where: tuple[Expr, Expr, Expr],
    at: tuple[Expr, Expr],
    chunks: Expr,
) -> None:
    """One row of the result, `where`, from its parts: a block and a row of it."""
    v = p.vector
    block, row = at
    sums = T.alloc_buffer((1, p.width), "float32")
    top, total = T.alloc_buffer((1,), "float32"), T.alloc_buffer((1,), "float32")
    T.buffer_store(top, T.float32(MINUS_INFINITY), [0])
    T.buffer_store(total, T.float32(0), [0])
    with T.serial(0, p.width // v.lanes) as d:
        T.buffer_store(sums, v.splat(0.0), [0, T.ramp(d * v.lanes, 1, v.lanes)])
    with T.serial(0, chunks) as n:
        T.buffer_store(top, T.max(parts.tops[block, n, row], top[0]), [0])
    base = finite(top[0])
    with T.serial(0, chunks) as n:
        share = T.bind(T.exp(parts.tops[block, n, row] - base))
        T.buffer_store(total, total[0] + parts.totals[block, n, row] * share, [0])
    f = factor(p, top[0], total[0], where[1])
    with T.serial(0, chunks) as n:
        share = v.bind(v.splat(T.exp(parts.tops[block, n, row] - base) * f))
        with T.serial(0, p.width // v.lanes) as d:
            lanes = T.ramp(d * v.lanes, 1, v.lanes)
            part = parts.sums[block, n, row, lanes]
            T.buffer_store(sums, v.fma(part, share, sums[0, lanes]), [0, lanes])
    write_row(p, where, sums, 0)
