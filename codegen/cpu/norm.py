"""Norms of rows on the CPU, with the addition of a residual if there is one.

    rms_norm    x[T, D] (+ residual[T, D] -> sum[T, D])  weight?[D]            -> out[T, D]
    layer_norm  x[T, D] (+ residual[T, D] -> sum[T, D])  weight?[D]  bias?[D]  -> out[T, D]

Each row is read once from memory; the second pass over it reads the L1 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.parallel import ELEMENT
from moec.codegen.cpu.vector import Vector, rounded
from moec.codegen.specs.norm import NormSpec
from moec.dtypes import LONG_NAMES
from moec.target.cpu import CpuTarget

_SIDE_BY_SIDE = 4  # independent sums, since an addition waits for the previous one to its sum


@dataclass(frozen=True)
class _Rows:
    spec: NormSpec
    v: Vector
    x: Buffer
    residual: Buffer | None
    total: Buffer | None
    weight: Buffer | None
    bias: Buffer | None
    out: Buffer

    def load(self, buffer: Buffer, index: tuple[Expr, ...], count: Expr | None) -> Expr:
        if count is None:
            return self.v.load(buffer, index)
        return self.v.load_tail(buffer, index, count)

    def store(self, buffer: Buffer, t: Expr, d: Expr, x: Expr, count: Expr | None) -> None:
        if count is None:
            self.v.store(buffer, (t, d), x)
        else:
            self.v.store_tail(buffer, (t, d), x, count)


def norm(spec: NormSpec, target: CpuTarget, name: str = "norm") -> PrimFunc:
    """The kernel (x, residual?, weight?, bias?, sum?, out); `sum` exists with a residual."""
    v = Vector(target)
    with kernel(name, target) as frame:
        rows = T.int64()

        def tensor(name: str, shape: tuple[Expr | int, ...], dtype: str) -> Buffer:
            return argument(name, shape, LONG_NAMES[dtype])

        matrix = (rows, spec.width)
        x = tensor("x", matrix, spec.x)
        residual = tensor("residual", matrix, spec.x) if spec.residual else None
        weight = tensor("weight", (spec.width,), spec.weight) if spec.weight else None
        bias = tensor("bias", (spec.width,), spec.bias) if spec.bias else None
        total = tensor("sum", matrix, spec.x) if spec.residual else None
        out = tensor("out", matrix, spec.out)
        work = rows * (spec.width * ELEMENT)
        with parallel.parallel_for(rows, work) as t:
            _row(_Rows(spec, v, x, residual, total, weight, bias, out), t)
    return frame.function


def _row(c: _Rows, t: Expr) -> None:
    v, spec = c.v, c.spec
    source = c.x
    if c.residual is not None and c.total is not None:
        residual, source = c.residual, c.total

        def add(d: Expr, count: Expr | None) -> None:
            x = c.load(c.x, (t, d), count)
            if spec.scale is not None:
                x = rounded(v, x * v.splat(spec.scale), LONG_NAMES[spec.x])
            c.store(source, t, d, x + c.load(residual, (t, d), count), count)

        _sweep(c, add)

    mean = v.splat(0.0)
    if spec.kind == "layer":
        mean = v.bind(v.splat(_sum(c, source, t, lambda x: x) / T.float32(spec.width)))
    squares = _sum(c, source, t, lambda x: (x - mean) * (x - mean))
    variance = v.splat(squares / T.float32(spec.width) + T.float32(spec.eps))
    scale = v.bind(v.splat(1.0) / v.sqrt(variance))

    def finish(d: Expr, count: Expr | None) -> None:
        y = (c.load(source, (t, d), count) - mean) * scale
        if spec.round_first:
            y = rounded(v, y, LONG_NAMES[spec.x])
        if c.weight is not None:
            weight = c.load(c.weight, (d,), count)
            y = y * (weight + v.splat(1.0) if spec.plus_one else weight)
        if c.bias is not None:
            y = y + c.load(c.bias, (d,), count)
        c.store(c.out, t, d, y, count)

    _sweep(c, finish)


def _sweep(c: _Rows, body: Callable[[Expr, Expr | None], None]) -> None:
    """body(first column, number of lanes) for each vector of a row; None: all lanes."""
    full_vectors, rest = divmod(c.spec.width, c.v.lanes)
    with T.serial(0, full_vectors) as j:
        body(j * c.v.lanes, None)
    if rest:
        body(full_vectors * c.v.lanes, T.int32(rest))


def _sum(c: _Rows, source: Buffer, t: Expr, of: Callable[[Expr], Expr]) -> Expr:
    """The sum of of(x) over row t."""
    v = c.v
    lane = T.ramp(0, 1, v.lanes)
    acc = [T.alloc_buffer((v.lanes,), "float32") for _ in range(_SIDE_BY_SIDE)]
    for a in acc:
        T.buffer_store(a, v.splat(0.0), [lane])
    full_vectors, rest = divmod(c.spec.width, v.lanes)
    rounds, left = divmod(full_vectors, len(acc))
    with T.serial(0, rounds) as j:
        for i, a in enumerate(acc):
            x = v.load(source, (t, (j * len(acc) + i) * v.lanes))
            T.buffer_store(a, a[lane] + of(x), [lane])
    for i in range(left):
        x = v.load(source, (t, (rounds * len(acc) + i) * v.lanes))
        T.buffer_store(acc[i], acc[i][lane] + of(x), [lane])
    if rest:
        x = v.load_tail(source, (t, full_vectors * v.lanes), T.int32(rest))
        inside = lane < T.broadcast(rest, v.lanes)
        T.buffer_store(acc[0], acc[0][lane] + T.Select(inside, of(x), v.splat(0.0)), [lane])
    return v.sum((acc[0][lane] + acc[1][lane]) + (acc[2][lane] + acc[3][lane]))
