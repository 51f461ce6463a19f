"""The arguments of attention, and which keys a query attends to, independent of the kernel.

q[B, Hq, S, Dk]  k[B, Hkv, L, Dk]  v[B, Hkv, L, Dv]  mask?  sinks?[Hq]  first?[B]
->  out[B, Hq, S, Dv]
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import argument, round_pair
from moec.codegen.specs.attention import AttentionSpec
from moec.dtypes import LONG_NAMES

LOWEST = float("-inf")


@dataclass(frozen=True)
class Arguments:
    """The arguments of a kernel; sizes are int64."""

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

    def at(self, name: str, b: Expr, head: Expr, n: Expr, d: Expr | int) -> tuple[Expr | int, ...]:
        """The index of one feature of q, k, v or out."""
        return (b, n, head, d) if name in self.spec.tokens_first else (b, head, n, d)


def arguments(spec: AttentionSpec) -> Arguments:
    batch, queries, keys = T.int64(), T.int64(), T.int64()
    dtype = LONG_NAMES[spec.dtype]

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
    return Arguments(spec, batch, queries, keys, q, k, v, mask, sinks, first, out)


def store_pair(
    a: Arguments, b: Expr, head: Expr, query: Expr, pair: Expr, values: tuple[Expr, Expr]
) -> None:
    """Stores two neighbouring features of out in 16 bits, as one word."""
    word = T.alloc_buffer((1,), "uint32", scope="local")
    words = T.decl_buffer((*a.out.shape[:3], a.spec.value_dim // 2), "uint32", data=a.out.data)
    round_pair(LONG_NAMES[a.spec.dtype], word[0], *values)
    T.buffer_store(words, word[0], list(a.at("out", b, head, query, pair)))


def key_position(a: Arguments, b: Expr, query: Expr) -> Expr:
    """The position of a query among the keys."""
    if a.first is None:
        return query
    # Clamped so that every query has at least one key, whatever `first` holds.
    start = T.max(T.min(a.first[b], a.keys - a.queries), T.int64(0))
    return T.bind(query + start)


def key_range(a: Arguments, position: Expr) -> tuple[Expr, Expr]:
    """The range of keys that causality, window and chunk let the query at a position attend to.
    Neither end falls as the position grows."""
    start, end = T.int64(0), a.keys
    if a.spec.is_causal:
        end = T.min(end, position + 1)
    if a.spec.window is not None:
        start = T.max(start, position - (a.spec.window - 1))
    if a.spec.chunk is not None:
        chunk = T.bind(position // a.spec.chunk * a.spec.chunk)
        start, end = T.max(start, chunk), T.min(end, chunk + a.spec.chunk)
    return T.bind(start), T.bind(end)


def masked(a: Arguments, score: Expr, b: Expr, head: Expr, query: Expr, key: Expr) -> Expr:
    """The scaled score with the mask: -inf where a bool mask is False, or the sum."""
    if a.mask is None or a.spec.mask is None:
        return score
    indices = (b, head, query, key)
    at = tuple(i if full else 0 for i, full in zip(indices, a.spec.mask.full, strict=True))
    if a.spec.mask.dtype == "bool":
        visible = a.mask[at] != T.int8(0)
        return T.bind(T.if_then_else(visible, score, T.float32(LOWEST)))
    return T.bind(score + T.cast(a.mask[at], "float32"))
