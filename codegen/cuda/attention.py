"""softmax(q @ k.T * scale + mask) @ v: one warp a query, one key after the other.

    q[B, Hq, S, Dk]  k[B, Hkv, L, Dk]  v[B, Hkv, L, Dv]  mask?  sinks?[Hq]  first?[B]
    ->  out[B, Hq, S, Dv]

Lane l has the features l, l + 32, ...; a score is a sum of the warp. The softmax is computed as
keys come (Milakov and Gimelshein, arXiv 1805.02867): the greatest score so far, and sums that are
rescaled where it grows. Right for all that an AttentionSpec says, and without tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.instructions import WARP, exp, warp_sum
from moec.codegen.specs.attention import AttentionSpec
from moec.dtypes import LONG_NAMES
from moec.target.cuda import CudaTarget

_WARPS = 4  # queries of a block
_LOWEST = float("-inf")


@dataclass(frozen=True)
class _Problem:
    """The arguments; sizes are int64."""

    spec: AttentionSpec
    batch: Expr
    queries: Expr
    keys: Expr
    q: Buffer
    k: Buffer
    v: Buffer
    mask: Buffer | None
    sinks: Buffer | None
    first: Buffer | None
    out: Buffer

    def at(self, name: str, b: Expr, head: Expr, n: Expr, d: Expr) -> tuple[Expr, ...]:
        """The index of one feature of q, k, v or out."""
        return (b, n, head, d) if name in self.spec.tokens_first else (b, head, n, d)


@dataclass(frozen=True)
class _Query:
    """What one warp computes; its lane; the place among the keys where the query stands."""

    b: Expr
    head: Expr
    position: Expr
    key_position: Expr
    lane: Expr


def attention(spec: AttentionSpec, target: CudaTarget, name: str = "attention") -> PrimFunc:
    """The kernel (q, k, v, mask?, sinks?, first?, out). A query that sees no key gives zeros."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            p = _arguments(spec)
            count = p.batch * spec.q_heads * p.queries
            blocks = T.max((count + (_WARPS - 1)) // _WARPS, T.int64(1))
            grid = T.launch_thread("blockIdx.x", T.cast(blocks, "int32"))
            with grid as block, T.launch_thread("threadIdx.x", _WARPS * WARP) as thread:
                number = T.bind(T.cast(block, "int64") * _WARPS + T.cast(thread // WARP, "int64"))
                with T.If(number < count), T.Then():
                    _attend(p, _query(p, number, T.bind(thread % WARP)))
    return builder.get()


def _arguments(spec: AttentionSpec) -> _Problem:
    batch, queries, keys = T.int64(), T.int64(), T.int64()
    dtype = LONG_NAMES[spec.dtype]

    def argument(name: str, shape: tuple[Expr | int, ...], dtype: str) -> Buffer:
        return T.match_buffer(T.arg(name, T.handle()), shape, dtype)

    def tensor(name: str, heads: int, n: Expr, width: int) -> Buffer:
        swapped = name in spec.tokens_first
        return argument(
            name, (batch, n, heads, width) if swapped else (batch, heads, n, width), dtype
        )

    q = tensor("q", spec.q_heads, queries, spec.key_dim)
    k = tensor("k", spec.kv_heads, keys, spec.key_dim)
    v = tensor("v", spec.kv_heads, keys, spec.value_dim)
    mask = sinks = first = None
    if spec.mask is not None:
        full_shape = (batch, spec.q_heads, queries, keys)
        shape = tuple(d if full else 1 for d, full in zip(full_shape, spec.mask.full, strict=True))
        mask = argument("mask", shape, LONG_NAMES[spec.mask.dtype])
    if spec.sinks:
        sinks = argument("sinks", (spec.q_heads,), dtype)
    if spec.placed:
        first = argument("first", (batch,), "int64")
    out = tensor("out", spec.q_heads, queries, spec.value_dim)
    if mask is not None and spec.mask is not None and spec.mask.dtype == "bool":
        mask = T.decl_buffer(mask.shape, "int8", data=mask.data)
    return _Problem(spec, batch, queries, keys, q, k, v, mask, sinks, first, out)


def _query(p: _Problem, number: Expr, lane: Expr) -> _Query:
    position = T.bind(number % p.queries)
    row = T.bind(number // p.queries)
    b, head = T.bind(row // p.spec.q_heads), T.bind(row % p.spec.q_heads)
    key_position = position
    if p.first is not None:
        # Such that every query has a key, whatever the argument holds.
        start = T.max(T.min(p.first[b], p.keys - p.queries), T.int64(0))
        key_position = T.bind(position + start)
    return _Query(b, head, position, key_position, lane)


def _attend(p: _Problem, query: _Query) -> None:
    spec, zero = p.spec, T.float32(0)
    kv = T.bind(query.head // spec.group)
    q = _features(p.q, p.at("q", query.b, query.head, query.position, zero), query, spec.key_dim)
    sums = T.alloc_buffer((-(-spec.value_dim // WARP),), "float32", scope="local")
    top = T.alloc_buffer((1,), "float32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    for i in range(-(-spec.value_dim // WARP)):
        T.buffer_store(sums, zero, [i])
    if p.sinks is not None:
        T.buffer_store(top, T.cast(p.sinks[query.head], "float32"), [0])
        T.buffer_store(total, T.float32(1), [0])
    else:
        T.buffer_store(top, T.float32(_LOWEST), [0])
        T.buffer_store(total, zero, [0])
    start, end = _range(p, query)
    with T.serial(0, end - start) as turn:
        key = T.bind(start + turn)
        score = _score(p, query, kv, key, q)
        with T.If(score != T.float32(_LOWEST)), T.Then():
            best = T.bind(T.call_extern("float32", "fmaxf", top[0], score))
            share = T.bind(exp(score - best))
            rescale = T.bind(exp(top[0] - best))
            T.buffer_store(top, best, [0])
            T.buffer_store(total, total[0] * rescale + share, [0])
            at = p.at("v", query.b, kv, key, zero)
            values = _features(p.v, at, query, spec.value_dim)
            for i in range(-(-spec.value_dim // WARP)):
                T.buffer_store(sums, sums[i] * rescale + share * values[i], [i])
    divisor = T.bind(T.if_then_else(total[0] == zero, T.float32(1), total[0]))
    for i in range(-(-spec.value_dim // WARP)):
        d = T.bind(query.lane + i * WARP)
        with T.If(d < spec.value_dim), T.Then():
            at = p.at("out", query.b, query.head, query.position, T.cast(d, "int64"))
            T.buffer_store(p.out, T.cast(sums[i] / divisor, LONG_NAMES[spec.dtype]), list(at))


def _range(p: _Problem, query: _Query) -> tuple[Expr, Expr]:
    """The keys that causality, window and chunk let a query see."""
    start, end = T.int64(0), p.keys
    if p.spec.is_causal:
        end = T.min(end, query.key_position + 1)
    if p.spec.window is not None:
        start = T.max(start, query.key_position - (p.spec.window - 1))
    if p.spec.chunk is not None:
        chunk = T.bind(query.key_position // p.spec.chunk * p.spec.chunk)
        start, end = T.max(start, chunk), T.min(end, chunk + p.spec.chunk)
    return T.bind(start), T.bind(end)


def _score(p: _Problem, query: _Query, kv: Expr, key: Expr, q: list[Expr]) -> Expr:
    keys = _features(p.k, p.at("k", query.b, kv, key, T.int64(0)), query, p.spec.key_dim)
    part = q[0] * keys[0]
    for a, b in zip(q[1:], keys[1:], strict=True):
        part = part + a * b
    score = T.bind(warp_sum(T.bind(part)) * T.float32(p.spec.scale))
    if p.mask is None or p.spec.mask is None:
        return score
    indices = (query.b, query.head, query.position, key)
    at = tuple(i if full else 0 for i, full in zip(indices, p.spec.mask.full, strict=True))
    if p.spec.mask.dtype == "bool":
        visible = p.mask[at] != T.int8(0)
        return T.bind(T.if_then_else(visible, score, T.float32(_LOWEST)))
    return T.bind(score + T.cast(p.mask[at], "float32"))


def _features(buffer: Buffer, at: tuple[Expr, ...], query: _Query, width: int) -> list[Expr]:
    """This lane's features of the row at `at`, in float32; zeros behind the last."""
    features = []
    for i in range(-(-width // WARP)):
        d = query.lane + i * WARP
        inside = T.min(d, width - 1) if (i + 1) * WARP > width else d
        value = T.cast(buffer[(*at[:-1], T.cast(inside, "int64"))], "float32")
        if (i + 1) * WARP > width:
            value = T.if_then_else(d < width, value, T.float32(0))
        features.append(T.bind(value))
    return features
