"""Normalisation of rows, optionally after adding a residual: one block per row.

    rms_norm    x[T, D] (+ residual[T, D] -> sum[T, D])  weight?[D]            -> out[T, D]
    layer_norm  x[T, D] (+ residual[T, D] -> sum[T, D])  weight?[D]  bias?[D]  -> out[T, D]

Consecutive threads read consecutive columns. Sums have one fixed order on every GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.instructions import WARP, argument, barrier, each, kernel, warp_sum
from moec.codegen.specs.norm import NormSpec
from moec.dtypes import LONG_NAMES
from moec.target.cuda import CudaTarget

_MOST_THREADS = 256
_COLUMNS = 4  # the least number of columns per thread


@dataclass(frozen=True)
class _Block:
    """The threads of a block, and float32[warps] in shared memory for their partial sums."""

    threads: int
    thread: Expr
    sums: Buffer

    def total(self, width: int, of: Callable[[Expr], Expr]) -> Expr:
        """The sum of of(column) over a row."""
        part = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(part, T.float32(0), [0])
        self.columns(width, lambda d: T.buffer_store(part, part[0] + of(d), [0]))
        warp_total = warp_sum(part[0])
        barrier()  # all threads have read the previous sums
        with T.If(self.thread % WARP == 0), T.Then():
            T.buffer_store(self.sums, warp_total, [self.thread // WARP])
        barrier()
        total = self.sums[0]
        for warp in range(1, self.threads // WARP):
            total = total + self.sums[warp]
        return T.bind(total)

    def columns(self, width: int, body: Callable[[Expr], None]) -> None:
        each(width, self.threads, self.thread, body)


def norm(spec: NormSpec, target: CudaTarget, name: str = "norm") -> PrimFunc:
    """The kernel (x, residual?, weight?, bias?, sum?, out); `sum` is an argument if `residual`
    is."""
    warps = -(-spec.width // (_COLUMNS * WARP))
    threads = min(_MOST_THREADS, warps * WARP)
    with kernel(name, restrict=True) as builder:
        rows = T.int64()

        shape = (rows, spec.width)
        x = argument("x", shape, spec.x)
        residual = argument("residual", shape, spec.x) if spec.residual else None
        weight = argument("weight", (spec.width,), spec.weight) if spec.weight else None
        bias = argument("bias", (spec.width,), spec.bias) if spec.bias else None
        total = argument("sum", shape, spec.x) if spec.residual else None
        out = argument("out", shape, spec.out)
        grid = T.launch_thread("blockIdx.x", T.cast(T.max(rows, T.int64(1)), "int32"))
        with grid as block, T.launch_thread("threadIdx.x", threads) as thread:
            row = T.bind(T.cast(block, "int64"))
            sums = T.alloc_buffer((threads // WARP,), "float32", scope="shared")
            with T.If(row < rows), T.Then():
                on = _Block(threads, thread, sums)
                source = x
                if residual is not None and total is not None:
                    _add(spec, on, row, x, residual, total)
                    source = total  # each thread reads only what it wrote
                _normalise(spec, on, row, source, weight, bias, out)
    return builder.get()


def _add(spec: NormSpec, on: _Block, row: Expr, x: Buffer, residual: Buffer, total: Buffer) -> None:
    def add(d: Expr) -> None:
        value = T.cast(x[row, d], "float32")
        if spec.scale is not None:
            value = _rounded(value * T.float32(spec.scale), spec.x)
        total_value = value + T.cast(residual[row, d], "float32")
        T.buffer_store(total, T.cast(total_value, LONG_NAMES[spec.x]), [row, d])

    on.columns(spec.width, add)


def _normalise(
    spec: NormSpec,
    on: _Block,
    row: Expr,
    source: Buffer,
    weight: Buffer | None,
    bias: Buffer | None,
    out: Buffer,
) -> None:
    def read(d: Expr) -> Expr:
        return T.cast(source[row, d], "float32")

    width = T.float32(spec.width)
    mean: Expr = T.float32(0)
    if spec.kind == "layer":
        mean = T.bind(on.total(spec.width, read) / width)

    def square(d: Expr) -> Expr:
        away = T.bind(read(d) - mean)
        return away * away

    variance = on.total(spec.width, square) / width + T.float32(spec.eps)
    scale = T.bind(T.float32(1) / T.sqrt(variance))

    def write(d: Expr) -> None:
        y = (read(d) - mean) * scale
        if spec.round_first:
            y = _rounded(y, spec.x)
        if weight is not None:
            factor = T.cast(weight[d], "float32")
            y = y * (factor + T.float32(1) if spec.plus_one else factor)
        if bias is not None:
            y = y + T.cast(bias[d], "float32")
        T.buffer_store(out, T.cast(y, LONG_NAMES[spec.out]), [row, d])

    on.columns(spec.width, write)


def _rounded(x: Expr, dtype: str) -> Expr:
    """The float32 value of x after rounding to `dtype`."""
    return T.cast(T.cast(x, LONG_NAMES[dtype]), "float32") if dtype != "f32" else x
