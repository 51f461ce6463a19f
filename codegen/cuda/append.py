"""Writes new keys or values into a cache, in place: cache[b, h, first[b] + s] = rows[b, h, s].

    cache[B, H, L, D]  rows[B, H, S, D] or [B, S, H, D]  first[B]  cos?  sin?

One thread copies one feature. With cos and sin, it rotates two features, one from each half of a
row: (x * cos - y * sin, y * cos + x * sin), computed in float32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.instructions import argument, kernel
from moec.codegen.specs.attention import AnglesSpec, AppendSpec
from moec.dtypes import LONG_NAMES
from moec.target.cuda import CudaTarget

_THREADS = 256


@dataclass(frozen=True)
class _Angles:
    """cos or sin of each row, for both halves of its features."""

    spec: AnglesSpec
    values: Buffer

    def of(self, row: tuple[Expr, Expr, Expr], feature: Expr) -> Expr:
        """The value for one feature, in float32. If both halves of the features share values, one
        half is stored."""
        at = [i if full else T.int64(0) for i, full in zip(row, self.spec.full, strict=True)]
        value = self.values[(*at, feature % self.spec.width)]
        return T.bind(T.cast(value, "float32"))


def append(spec: AppendSpec, target: CudaTarget, name: str = "append") -> PrimFunc:
    """The kernel (cache, rows, first, cos?, sin?), all contiguous. Requires first[b] + S <= L; a
    larger first[b] writes the rows to the last slots, never outside the cache."""
    with kernel(name, restrict=True) as builder:
        batch, room, tokens = T.int64(), T.int64(), T.int64()

        cache = argument("cache", (batch, spec.heads, room, spec.width), spec.dtype)
        new = (*spec.row(batch, spec.heads, tokens), spec.width)
        rows, first = argument("rows", new, spec.dtype), argument("first", (batch,), "i64")
        turns = []
        for of, angles in zip(spec.turns or (), ("cos", "sin"), strict=False):
            sizes = zip(of.full, (batch, spec.heads, tokens), strict=True)
            shape = (*(size if full else 1 for full, size in sizes), of.width)
            turns.append(_Angles(of, argument(angles, shape, of.dtype)))
        features = spec.width // 2 if turns else spec.width
        count = T.if_then_else(room > 0, batch * spec.heads * tokens * features, T.int64(0))
        blocks = T.max((count + (_THREADS - 1)) // _THREADS, T.int64(1))
        grid = T.launch_thread("blockIdx.x", T.cast(blocks, "int32"))
        with grid as block, T.launch_thread("threadIdx.x", _THREADS) as thread:
            number = T.bind(T.cast(block, "int64") * _THREADS + T.cast(thread, "int64"))
            with T.If(number < count), T.Then():
                rest, feature = _divided(number, features)
                rest, s = _divided(rest, tokens)
                b, h = _divided(rest, spec.heads)
                slot = T.bind(T.max(T.min(first[b] + s, room - 1), T.int64(0)))
                source, to = (rows, spec.row(b, h, s)), (cache, (b, h, slot))
                if turns:
                    _turn(spec, source, to, feature, turns, (b, h, s))
                else:
                    T.buffer_store(cache, rows[(*source[1], feature)], [*to[1], feature])
    return builder.get()


def _divided(number: Expr, by: Expr | int) -> tuple[Expr, Expr]:
    """Quotient and remainder. Both operands are nonnegative, so CUDA's truncating division is
    exact."""
    size = T.int64(by) if isinstance(by, int) else by
    return T.bind(T.truncdiv(number, size)), T.bind(T.truncmod(number, size))


_Row = tuple[Expr, Expr, Expr]


def _turn(
    spec: AppendSpec,
    source: tuple[Buffer, _Row],
    to: tuple[Buffer, _Row],
    feature: Expr,
    turns: list[_Angles],
    at: _Row,
) -> None:
    """Rotates one feature of the first half together with its partner in the second half."""
    (rows, row), (cache, slot) = source, to
    features = (feature, T.bind(feature + spec.width // 2))
    x, y = (T.bind(T.cast(rows[(*row, d)], "float32")) for d in features)
    (cos_x, cos_y), (sin_x, sin_y) = ([angles.of(at, d) for d in features] for angles in turns)
    values = (x * cos_x - y * sin_x, y * cos_y + x * sin_y)
    for d, value in zip(features, values, strict=True):
        T.buffer_store(cache, T.cast(value, LONG_NAMES[spec.dtype]), [*slot, d])
