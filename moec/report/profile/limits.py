"""Measures this machine's limits: arithmetic on registers and reads of memory, with all threads."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import tvm
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.llvm.amx import SUMS, TILE_BYTES, TILE_ROWS
from moec.codegen.cpu.vector import Vector
from moec.runtime.process.threads import available
from moec.target.cpu import host

THREADS = available()
AHEAD = 8192  # bytes; loads alone keep fewer cache lines in flight than a core could


def _tvm(tensor: torch.Tensor) -> tvm.runtime.Tensor:
    return tvm.runtime.from_dlpack(tensor)


def peak(dtype: str) -> float:
    """FLOP/s of all threads on sums of products in registers."""
    target, steps = host(), 400_000
    v = Vector(target)
    bf16 = dtype == "bfloat16"
    if bf16 and target.bf16_tiles:
        sums, flops = SUMS, TILE_ROWS * v.lanes * 2 * (TILE_BYTES // 2)
        body = _tile_sums
    else:
        # As many sums as a product keeps in registers; more would be spilled to memory.
        sums = target.tile_rows * target.tile_vectors
        flops = v.lanes * (4 if bf16 and target.bf16_dot else 2)
        body = _pair_sums if bf16 and target.bf16_dot else _float_sums
    with kernel("peak", target) as frame:
        x = argument("x", (1,), "int32")
        y = argument("y", (THREADS, sums * v.lanes), "float32")
        with T.parallel(0, THREADS) as thread:
            body(v, x, y, thread, sums, steps)
    function = tvm.compile(frame.function, tvm.target.Target(target.tvm()))["peak"]
    x, y = torch.zeros(1, dtype=torch.int32), torch.empty(THREADS, sums * v.lanes)
    seconds = best(lambda: function(_tvm(x), _tvm(y)))
    return THREADS * steps * sums * flops / seconds


def _tile_sums(v: Vector, x: Buffer, y: Buffer, thread: Expr, sums: int, steps: int) -> None:
    v.tiles("begin")
    for i in range(2 * sums):
        v.tile_zero(i)
    with T.serial(0, steps):
        for i in range(sums):
            v.tile_bf16(i, sums, sums + 1)
    v.tiles("end")


def _pair_sums(v: Vector, x: Buffer, y: Buffer, thread: Expr, sums: int, steps: int) -> None:
    pair = T.bind(T.broadcast(x[0], v.lanes))
    _sums(v, y, thread, sums, steps, lambda old: v.dot2(old, pair, pair))


def _float_sums(v: Vector, x: Buffer, y: Buffer, thread: Expr, sums: int, steps: int) -> None:
    real = T.bind(T.broadcast(T.cast(x[0], "float32"), v.lanes))
    _sums(v, y, thread, sums, steps, lambda old: v.fma(real, real, old))


def _sums(
    v: Vector, y: Buffer, thread: Expr, sums: int, steps: int, add: Callable[[Expr], Expr]
) -> None:
    lanes = T.ramp(0, 1, v.lanes)
    acc = [T.alloc_buffer((v.lanes,), "float32") for _ in range(sums)]
    for a in acc:
        T.buffer_store(a, v.splat(0.0), [lanes])
    with T.serial(0, steps):
        for a in acc:
            T.buffer_store(a, add(a[lanes]), [lanes])
    for j, a in enumerate(acc):
        v.store(y, [thread, j * v.lanes], a[lanes])


def bandwidth() -> float:
    """Bytes/s of all threads that read 512 MiB and sum it: the best of seven."""
    read = reading()
    return max(read() for _ in range(7))


def reading() -> Callable[[], float]:
    """A function that reads once as `bandwidth` does and returns the bytes/s: the speed of memory
    that is shared with others varies by the minute."""
    target, parts = host(), 64
    v = Vector(target)
    each = (1 << 27) // parts
    with kernel("read", target) as frame:
        x = argument("x", (parts, each), "float32")
        y = argument("y", (parts, 8 * v.lanes), "float32")
        with T.parallel(0, parts) as part:
            lanes = T.ramp(0, 1, v.lanes)
            acc = [T.alloc_buffer((v.lanes,), "float32") for _ in range(8)]
            for a in acc:
                T.buffer_store(a, v.splat(0.0), [lanes])
            with T.serial(0, each // (8 * v.lanes)) as i:
                for j, a in enumerate(acc):
                    v.prefetch(x, [part, (i * 8 + j) * v.lanes + AHEAD // 4])
                    new = a[lanes] + v.load(x, [part, (i * 8 + j) * v.lanes])
                    T.buffer_store(a, new, [lanes])
            for j, a in enumerate(acc):
                v.store(y, [part, j * v.lanes], a[lanes])
    function = tvm.compile(frame.function, tvm.target.Target(target.tvm()))["read"]
    x, y = torch.zeros(parts, each), torch.empty(parts, 8 * v.lanes)
    return lambda: x.numel() * 4 / timed(lambda: function(_tvm(x), _tvm(y)))


def best(action: Callable[[], object], rounds: int = 7) -> float:
    return min(timed(action) for _ in range(rounds))


def warm(run: Callable[[], object]) -> None:
    """Calls `run` for 20 ms, in which an idle processor returns to its full clock speed."""
    start = time.perf_counter()
    while time.perf_counter() - start < 0.02:
        run()


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
