"""softmax(q @ k.T * scale + mask) @ v: one warp per query, one key after the other.

Queries with a position in a cache (`placed`) are few and attend to many keys. For them, all warps
of a block share one query: each warp takes every eighth key, and their sums are combined at the end
(Dao et al., Flash-Decoding, 2023, within a block).

Lane l holds the features l, l + 32, ...; a score is a sum over the warp. The softmax is computed
online (Milakov and Gimelshein, arXiv 1805.02867): it keeps the greatest score so far, and rescales
the sums when that grows. The kernel supports every AttentionSpec; it uses no tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

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
)
from moec.codegen.cuda.attention.softmax import divisor_of
from moec.codegen.cuda.instructions import WARP, barrier, each, exp, kernel, warp_sum
from moec.codegen.specs.attention import AttentionSpec
from moec.dtypes import LONG_NAMES
from moec.target.cuda import CudaTarget

_WARPS = 4  # queries per block
_SHARING = 8  # warps per block that share one query


@dataclass(frozen=True)
class _Query:
    """The query that a warp computes: its indices, the lane, the query's position among the keys,
    and the index of the warp among those that share the query."""

    b: Expr
    head: Expr
    position: Expr
    key_position: Expr
    lane: Expr
    warp: Expr


def attention(spec: AttentionSpec, target: CudaTarget, name: str = "attention") -> PrimFunc:
    """The kernel (q, k, v, mask?, sinks?, first?, out). A query without visible keys gives
    zeros."""
    with kernel(name, restrict=True) as builder:
        launch_warps(arguments(spec))
    return builder.get()


def launch_warps(p: Arguments) -> None:
    spec = p.spec
    count = p.batch * spec.q_heads * p.queries
    queries, warps = (1, _SHARING) if spec.placed else (_WARPS, _WARPS)
    blocks = T.max((count + (queries - 1)) // queries, T.int64(1))
    grid = T.launch_thread("blockIdx.x", T.cast(blocks, "int32"))
    with grid as block, T.launch_thread("threadIdx.x", warps * WARP) as thread:
        first, warp = T.cast(block, "int64") * queries, T.cast(thread // WARP, "int64")
        number = T.bind(first if spec.placed else first + warp)
        with T.If(number < count), T.Then():
            query = _query(p, number, T.bind(thread % WARP), T.bind(warp))
            part = _attend(p, query, step=_SHARING if spec.placed else 1)
            if spec.placed:
                _join(p, query, part, thread)
            else:
                _divide(p, query, part)


def _query(p: Arguments, number: Expr, lane: Expr, warp: Expr) -> _Query:
    position = T.bind(number % p.queries)
    row = T.bind(number // p.queries)
    b, head = T.bind(row // p.spec.q_heads), T.bind(row % p.spec.q_heads)
    return _Query(b, head, position, key_position(p, b, position), lane, warp)


@dataclass(frozen=True)
class _Part:
    """The partial result of one warp: the greatest score [1], the sum of exp(score - greatest) [1],
    and the sum of these weights times the values."""

    top: Buffer
    total: Buffer
    sums: Buffer


def _attend(p: Arguments, query: _Query, step: int) -> _Part:
    """Processes the keys of this warp: all, or every `step`-th if `step` warps share the query."""
    spec, zero = p.spec, T.float32(0)
    kv = T.bind(query.head // spec.group)
    q = _features(p.q, p.at("q", query.b, query.head, query.position, zero), query, spec.key_dim)
    sums = T.alloc_buffer((-(-spec.value_dim // WARP),), "float32", scope="local")
    top = T.alloc_buffer((1,), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    for i in range(-(-spec.value_dim // WARP)):
        T.buffer_store(sums, zero, [i])
    if p.sinks is not None:
        sink = T.cast(p.sinks[query.head], "float32")
        alone = query.warp == 0 if step > 1 else T.bool(True)  # count the sink once
        T.buffer_store(top, T.if_then_else(alone, sink, T.float32(LOWEST)), [0])
        T.buffer_store(total, T.if_then_else(alone, T.float32(1), zero), [0])
    else:
        T.buffer_store(top, T.float32(LOWEST), [0])
        T.buffer_store(total, zero, [0])
    start, end = key_range(p, query.key_position)
    begin = start if step == 1 else T.bind(start + query.warp)
    count = end - start if step == 1 else T.max(end - begin + (step - 1), T.int64(0)) // step
    with T.serial(0, count) as turn:
        key = T.bind(begin + turn * step)
        score = _score(p, query, kv, key, q)
        with T.If(score != T.float32(LOWEST)), T.Then():
            best = T.bind(T.call_extern("float32", "fmaxf", top[0], score))
            share = T.bind(exp(score - best))
            rescale = T.bind(exp(top[0] - best))
            T.buffer_store(top, best, [0])
            T.buffer_store(total, total[0] * rescale + share, [0])
            at = p.at("v", query.b, kv, key, zero)
            values = _features(p.v, at, query, spec.value_dim)
            for i in range(-(-spec.value_dim // WARP)):
                T.buffer_store(sums, sums[i] * rescale + share * values[i], [i])
    return _Part(top, total, sums)


def _divide(p: Arguments, query: _Query, part: _Part) -> None:
    """Writes the result of a query that one warp computes alone."""
    divisor = divisor_of(part.total[0])
    for i in range(-(-p.spec.value_dim // WARP)):
        d = T.bind(query.lane + i * WARP)
        with T.If(d < p.spec.value_dim), T.Then():
            _store(p, query, d, part.sums[i] / divisor)


def _join(p: Arguments, query: _Query, part: _Part, thread: Expr) -> None:
    """Writes the result of a query that all warps of the block share. Each warp's part is rescaled
    to the greatest score of all. Parts are added in warp order, so the result is deterministic."""
    width = p.spec.value_dim
    tops, totals = (T.alloc_buffer((_SHARING,), "float32", scope="shared") for _ in range(2))
    sums = T.alloc_buffer((_SHARING, width), "float32", scope="shared")
    with T.If(query.lane == 0), T.Then():
        T.buffer_store(tops, part.top[0], [query.warp])
        T.buffer_store(totals, part.total[0], [query.warp])
    for i in range(-(-width // WARP)):
        d = T.bind(query.lane + i * WARP)
        with T.If(d < width), T.Then():
            T.buffer_store(sums, part.sums[i], [query.warp, d])
    barrier()
    best = tops[0]
    for warp in range(1, _SHARING):
        best = T.call_extern("float32", "fmaxf", best, tops[warp])
    best, lowest = T.bind(best), T.float32(LOWEST)
    scales = [
        T.bind(T.if_then_else(tops[w] == lowest, T.float32(0), exp(tops[w] - best)))
        for w in range(_SHARING)
    ]
    total = T.float32(0)
    for warp in range(_SHARING):
        total = total + scales[warp] * totals[warp]
    divisor = divisor_of(T.bind(total))

    def column(d: Expr) -> None:
        value = T.float32(0)
        for warp in range(_SHARING):
            value = value + scales[warp] * sums[warp, d]
        _store(p, query, d, value / divisor)

    each(width, _SHARING * WARP, thread, column)


def _store(p: Arguments, query: _Query, d: Expr, value: Expr) -> None:
    at = p.at("out", query.b, query.head, query.position, T.cast(d, "int64"))
    T.buffer_store(p.out, T.cast(value, LONG_NAMES[p.spec.dtype]), list(at))


def _score(p: Arguments, query: _Query, kv: Expr, key: Expr, q: list[Expr]) -> Expr:
    keys = _features(p.k, p.at("k", query.b, kv, key, T.int64(0)), query, p.spec.key_dim)
    part = q[0] * keys[0]
    for a, b in zip(q[1:], keys[1:], strict=True):
        part = part + a * b
    score = T.bind(warp_sum(T.bind(part)) * T.float32(p.spec.scale))
    return masked(p, score, query.b, query.head, query.position, key)


def _features(buffer: Buffer, at: tuple[Expr, ...], query: _Query, width: int) -> list[Expr]:
    """This lane's features of the row at `at`, in float32; zero beyond the last feature."""
    features = []
    for i in range(-(-width // WARP)):
        d = query.lane + i * WARP
        inside = T.min(d, width - 1) if (i + 1) * WARP > width else d
        value = T.cast(buffer[(*at[:-1], T.cast(inside, "int64"))], "float32")
        if (i + 1) * WARP > width:
            value = T.if_then_else(d < width, value, T.float32(0))
        features.append(T.bind(value))
    return features
