"""One attention: its sizes and arguments, and the code that prefill and decode share.

    q[B, Hq, S, Dk]  k[B, Hkv, L, Dk]  v[B, Hkv, L, Dv]  mask?  sinks?[Hq]  first?[B]
    ->  out[B, Hq, S, Dv]

Query heads that share a key head are rows of one problem: row s*g + j is position s of the
j-th of the g heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.frame import argument
from moec.codegen.cpu.llvm.amx import SUMS, TILE_ROWS
from moec.codegen.cpu.vector import Softmax, Vector
from moec.codegen.specs.attention import AttentionSpec, MaskSpec
from moec.dtypes import LONG_NAMES
from moec.target.cpu import CpuTarget

MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class Mask:
    spec: MaskSpec
    values: Buffer  # int8 where the spec says bool


@dataclass(frozen=True)
class Problem:
    """The arguments inside an open prim_func. All sizes and indices are int64."""

    spec: AttentionSpec
    vector: Vector
    soft: Softmax
    batch: Expr
    queries: Expr
    keys: Expr
    q: Buffer
    k: Buffer
    v: Buffer
    mask: Mask | None
    sinks: Buffer | None
    first: Buffer | None
    out: Buffer

    @property
    def heads(self) -> Expr:
        """The number of key heads of the batch, which are independent problems."""
        return self.batch * self.spec.kv_heads

    @property
    def rows(self) -> Expr:
        """Query rows of one key head."""
        return self.queries * self.spec.group

    @property
    def features(self) -> int:
        """The features of a key and its value."""
        return self.spec.key_dim + self.spec.value_dim

    @property
    def width(self) -> int:
        """The value's features, rounded up to full vectors."""
        return round_up(self.spec.value_dim, self.vector.lanes)

    def at(self, of: str, b: Expr, head: Expr, n: Expr, d: Expr) -> tuple[Expr, ...]:
        """The index of one feature in q, k, v or out."""
        return (b, n, head, d) if of in self.spec.tokens_first else (b, head, n, d)

    def split(self, head: Expr) -> tuple[Expr, Expr]:
        """batch, key head <- one of `heads`"""
        kv = self.spec.kv_heads
        return T.bind(T.floordiv(head, kv)), T.bind(T.floormod(head, kv))

    def key_position(self, batch: Expr, position: Expr) -> Expr:
        """The position of a query among the keys, int64."""
        return position if self.first is None else position + self.start(batch)

    def start(self, batch: Expr) -> Expr:
        """The position of a sequence's first query among the keys, clamped so that every query has
        a key for any content of the argument."""
        assert self.first is not None
        return T.max(T.min(self.first[batch], self.keys - self.queries), 0)

    def end(self, head: Expr) -> Expr:
        """The end of the keys that any query of a key head may attend to."""
        if self.first is None or not self.spec.is_causal:
            return self.keys
        b, _ = self.split(head)
        return T.bind(T.min(self.keys, self.start(b) + self.queries))

    def query_at(self, head: Expr, row: Expr) -> tuple[Expr, Expr, Expr]:
        """batch, query head, position <- a key head and its row"""
        b, kv = self.split(head)
        group = self.spec.group
        return b, kv * group + T.floormod(row, group), T.floordiv(row, group)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def arguments(spec: AttentionSpec, target: CpuTarget) -> Problem:
    """Declare the arguments: q, k, v, mask?, sinks?, first?, out."""
    batch, queries, keys = T.int64(), T.int64(), T.int64()
    dtype = LONG_NAMES[spec.dtype]

    def tensor(name: str, heads: int, n: Expr, width: int) -> Buffer:
        first = name in spec.tokens_first
        shape = (batch, n, heads, width) if first else (batch, heads, n, width)
        return argument(name, shape, dtype)

    q = tensor("q", spec.q_heads, queries, spec.key_dim)
    k = tensor("k", spec.kv_heads, keys, spec.key_dim)
    v = tensor("v", spec.kv_heads, keys, spec.value_dim)
    values = sinks = first = None
    if spec.mask is not None:
        full_shape = (batch, spec.q_heads, queries, keys)
        shape = tuple(d if full else 1 for d, full in zip(full_shape, spec.mask.full, strict=True))
        mask_dtype = LONG_NAMES.get(spec.mask.dtype, "bool")
        values = argument("mask", shape, mask_dtype)
    if spec.sinks:
        sinks = argument("sinks", (spec.q_heads,), dtype)
    if spec.placed:
        first = argument("first", (batch,), "int64")
    out = tensor("out", spec.q_heads, queries, spec.value_dim)
    mask = None
    if spec.mask is not None and values is not None:
        if spec.mask.dtype == "bool":
            values = T.decl_buffer(values.shape, "int8", data=values.data)
        mask = Mask(spec.mask, values)
    vector = Vector(target)
    soft = Softmax(vector)
    return Problem(spec, vector, soft, batch, queries, keys, q, k, v, mask, sinks, first, out)


def reach(p: Problem, batch: Expr, position: Expr) -> Expr:
    """The end of the keys that a position may attend to, which increases with the position."""
    end, position = p.keys, p.key_position(batch, position)
    if p.spec.is_causal:
        end = T.min(end, position + 1)
    if p.spec.chunk is not None:
        end = T.min(end, (T.floordiv(position, p.spec.chunk) + 1) * p.spec.chunk)
    return T.bind(end)


def start(p: Problem, batch: Expr, position: Expr) -> Expr | None:
    """The first key that a position may attend to, which increases with it. None: always 0."""
    first, position = None, p.key_position(batch, position)
    if p.spec.window is not None:
        first = T.max(position - (p.spec.window - 1), 0)
    if p.spec.chunk is not None:
        piece = T.floordiv(position, p.spec.chunk) * p.spec.chunk
        first = piece if first is None else T.max(first, piece)
    return None if first is None else T.bind(first)


def scaled(p: Problem, dots: Expr, unseen: Expr | None, visible: Expr, bias: Expr | None) -> Expr:
    """Scaled scores of consecutive keys; -inf for lanes before `unseen` and from `visible` on (both
    int32)."""
    v = p.vector
    lane = T.ramp(T.int32(0), 1, v.lanes)
    x = dots * v.splat(p.spec.scale)
    if bias is not None:
        x = x + bias
    attend = lane < T.broadcast(visible, v.lanes)
    if unseen is not None:
        attend = T.And(attend, lane >= T.broadcast(unseen, v.lanes))
    return T.bind(T.Select(attend, x, v.splat(MINUS_INFINITY)))


def load_mask(p: Problem, where: Sequence[Expr], bias: Buffer, row: Expr, vectors: Expr) -> None:
    """bias[row] = the mask's addend for the scores of consecutive keys; -inf for False.

    where: batch, query head, position, first key. Lanes after the last key are arbitrary.
    """
    assert p.mask is not None
    v, mask, full = p.vector, p.mask.values, p.mask.spec.full
    b, h, s = (x if varies else 0 for x, varies in zip(where[:3], full[:3], strict=True))
    with T.serial(0, vectors) as j:
        lanes = T.ramp(j * v.lanes, 1, v.lanes)
        if not full[3]:
            x = v.splat(_added(p.vector, mask, (b, h, s, 0)))
            T.buffer_store(bias, x, [row, lanes])
            return
        key = T.bind(where[3] + j * v.lanes)
        with T.If(key + v.lanes <= p.keys):
            with T.Then():
                if p.mask.spec.dtype == "bool":
                    allowed = mask[b, h, s, T.ramp(key, 1, v.lanes)]
                    allowed = allowed != T.broadcast(T.int8(0), v.lanes)
                    x = T.Select(allowed, v.splat(0.0), v.splat(MINUS_INFINITY))
                else:
                    x = v.load(mask, (b, h, s, key))
                T.buffer_store(bias, x, [row, lanes])
            with T.Else(), T.serial(0, T.max(p.keys - key, 0)) as i:
                T.buffer_store(bias, _added(v, mask, (b, h, s, key + i)), [row, j * v.lanes + i])


def _added(v: Vector, mask: Buffer, index: Sequence[Expr | int]) -> Expr:
    """One element of the mask as an addend."""
    if mask.dtype == "int8":
        allowed = mask[tuple(index)] != T.int8(0)
        return T.Select(allowed, T.float32(0), T.float32(MINUS_INFINITY))
    return v.scalar(mask, index)


def finite(top: Expr) -> Expr:
    """The number to subtract from scores: `top`, or 0 for -inf, as -inf - -inf would be NaN."""
    return T.bind(T.Select(top == T.float32(MINUS_INFINITY), T.float32(0), top))


def factor(p: Problem, top: Expr, total: Expr, query_head: Expr) -> Expr:
    """The final factor of a row's weighted values.

    top: the greatest score, total: the sum of exp(score - top). A row that attends to nothing gives
    zeros, as torch's scaled_dot_product_attention does.
    """
    zero, one = T.float32(0), T.float32(1)
    if p.sinks is None:
        return T.bind(T.Select(total == zero, zero, one / total))
    sink = p.vector.scalar(p.sinks, (query_head,))
    base = finite(T.bind(T.max(sink, top)))
    share = T.bind(T.exp(top - base))
    denominator = T.bind(total * share + T.exp(sink - base))
    return T.bind(T.Select(total == zero, zero, share / denominator))


def write_row(p: Problem, where: tuple[Expr, Expr, Expr], sums: Buffer, row: Expr) -> None:
    """out[where] = sums[row], rounded; where: batch, query head, position; sums already scaled."""
    v = p.vector
    full_vectors, rest = divmod(p.spec.value_dim, v.lanes)
    with T.serial(0, full_vectors) as d:
        x = sums[row, T.ramp(d * v.lanes, 1, v.lanes)]
        v.store(p.out, p.at("out", *where, d * v.lanes), x)
    if rest:
        d = full_vectors * v.lanes
        v.store_tail(p.out, p.at("out", *where, d), sums[row, T.ramp(d, 1, v.lanes)], T.int32(rest))


UNITS = TILE_ROWS  # int32 units of a row that one register holds
_ROWS, _TURNS = SUMS, 3  # the register of rows; the next three alternate for keys and values


@dataclass(frozen=True)
class Scratch:
    """Memory between the products: scores[row, key], weights[row, pair of keys]."""

    scores: Buffer
    weights: Buffer

    @staticmethod
    def of(v: Vector, block: int) -> Scratch:
        return Scratch(
            v.scratch((TILE_ROWS, block), "float32"), v.scratch((TILE_ROWS, block // 2), "int32")
        )


def multiply(
    v: Vector,
    rows: Callable[[int], Expr],
    row_units: int,
    units: int,
    other: Callable[[int, int], Expr],
    other_units: int,
    out: Callable[[int], Expr],
    vectors: int,
    added: bool,
) -> None:
    """out[16 rows, 16 of vector j] (+)= rows[16, units] @ other[units, 16 of vector j].

    `rows(u)`, `other(u, j)` and `out(j)` are the first elements of the blocks, at row 0 or unit u.
    Rows of the first are `row_units` int32 apart, of the second `other_units` int32, of `out`
    `other_units` float32. `added`: (+)= adds; else it overwrites.
    """
    for first in range(0, vectors, SUMS):
        group = range(first, min(first + SUMS, vectors))
        for i, j in enumerate(group):
            if added:
                v.tile_load(i, out(j), other_units * 4)
            else:
                v.tile_zero(i)
        for u in range(0, units, UNITS):
            v.tile_load(_ROWS, rows(u), row_units * 4)
            for i, j in enumerate(group):
                register = _ROWS + 1 + i % _TURNS
                v.tile_load(register, other(u, j), other_units * 4)
                v.tile_bf16(i, _ROWS, register)
        for i, j in enumerate(group):
            v.tile_store(i, out(j), other_units * 4)
