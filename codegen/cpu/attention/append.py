"""nn.append on the CPU, in place: cache[b, h, first[b] + s] = rows[b, h, s].

cache[B, H, L, D]  rows[B, H, S, D] or [B, S, H, D]  first[B]  cos?  sin?

With cos and sin, the two halves (x, y) of a row are rotated first, in float32 and rounded once:
x * cos - y * sin, y * cos + x * sin.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.parallel import ELEMENT, divide
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.attention import AnglesSpec, AppendSpec
from moec.dtypes import LONG_NAMES
from moec.target.cpu import CpuTarget

_WORDS = {"f32": ("int32", 1), "bf16": ("int16", 2), "f16": ("int16", 2)}
"""The type as which elements are moved, and how many of them are as large as a float32."""

Row = tuple[Expr | int, ...]


def append(spec: AppendSpec, target: CpuTarget, name: str = "append") -> PrimFunc:
    """The kernel (cache, rows, first, cos?, sin?), all contiguous. first[b] + S must be at most L;
    otherwise rows are written to the last slots, and never beyond the cache."""
    v = Vector(target)
    with kernel(name, target) as frame:
        batch, room, tokens = T.int64(), T.int64(), T.int64()

        def tensor(name: str, shape: Row, dtype: str) -> Buffer:
            return argument(name, shape, LONG_NAMES[dtype])

        cache_shape = (batch, spec.heads, room, spec.width)
        new = (*spec.row(batch, spec.heads, tokens), spec.width)
        cache, rows = tensor("cache", cache_shape, spec.dtype), tensor("rows", new, spec.dtype)
        first = argument("first", (batch,), "int64")
        turns = []
        for of, name in zip(spec.turns or (), ("cos", "sin"), strict=False):
            sizes = zip(of.full, (batch, spec.heads, tokens), strict=True)
            shape = (*(size if full else 1 for full, size in sizes), of.width)
            turns.append((of, tensor(name, shape, of.dtype)))
        count = T.Select(room > 0, batch * spec.heads * tokens, T.int64(0))
        work = count * (spec.width * ELEMENT)
        with parallel.parallel_for(count, work) as task:
            head, s = divide(task, tokens)
            b = T.bind(T.floordiv(head, spec.heads))
            h = T.bind(T.floormod(head, spec.heads))
            to = (b, h, T.bind(T.max(T.min(first[b] + s, room - 1), 0)))
            row = spec.row(b, h, s)
            if turns:
                cos, sin = (_angles(v, *turn, (b, h, s)) for turn in turns)
                _turn(v, spec, (rows, row), (cache, to), cos, sin)
            else:
                _copy(target, spec, (rows, row), (cache, to))
    return frame.function


def _copy(
    target: CpuTarget, spec: AppendSpec, source: tuple[Buffer, Row], to: tuple[Buffer, Row]
) -> None:
    word, many = _WORDS[spec.dtype]
    lanes = target.vector_lanes * many
    (rows, row), (cache, slot) = source, to
    rows, cache = (T.decl_buffer(x.shape, word, data=x.data) for x in (rows, cache))
    full_vectors, rest = divmod(spec.width, lanes)
    ramps = [T.ramp(j * lanes, 1, lanes) for j in range(full_vectors)]
    for d in (*ramps, *range(spec.width - rest, spec.width)):
        T.buffer_store(cache, rows[(*row, d)], [*slot, d])


Angles = Callable[[int, int], Expr]


def _angles(v: Vector, spec: AnglesSpec, values: Buffer, row: Row) -> Angles:
    """A function (feature, count) -> `count` of the row's angles, from that feature on."""
    at = [x if full else 0 for x, full in zip(row, spec.full, strict=True)]

    def load(feature: int, count: int) -> Expr:
        return _load(v, values, (*at, feature % spec.width), count)

    return load


def _load(v: Vector, buffer: Buffer, index: Row, count: int) -> Expr:
    if count == v.lanes:
        return v.load(buffer, index)
    return v.load_tail(buffer, index, T.int32(count))


def _turn(
    v: Vector,
    spec: AppendSpec,
    source: tuple[Buffer, Row],
    to: tuple[Buffer, Row],
    cos: Angles,
    sin: Angles,
) -> None:
    (rows, row), (cache, slot) = source, to
    half = spec.width // 2
    for d in range(0, half, v.lanes):
        count = min(v.lanes, half - d)
        x, y = (_load(v, rows, (*row, at), count) for at in (d, half + d))
        first = x * cos(d, count) - y * sin(d, count)
        second = y * cos(half + d, count) + x * sin(half + d, count)
        for at, value in ((d, first), (half + d, second)):
            if count == v.lanes:
                v.store(cache, (*slot, at), value)
            else:
                v.store_tail(cache, (*slot, at), value, T.int32(count))
