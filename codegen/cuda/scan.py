"""Inclusive prefix sums by the threads of one block, in shared memory (Hillis and Steele, 1986)."""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import barrier


def each(size: int, threads: int, thread: Expr, body: Callable[[Expr], None]) -> None:
    """Runs body(i) for 0 <= i < size, each i by one thread."""
    for turn in range(-(-size // threads)):
        i = T.bind(thread + turn * threads)
        with T.If(i < size), T.Then():
            body(i)


def running_sums(sums: Buffer, size: int, threads: int, thread: Expr) -> int:
    """Computes the inclusive prefix sums of sums[0 : size]. Returns the index of the first: 0 or
    `size`.

    sums: int32[2 * size] in shared memory. The caller synchronises the block before the call; the
    result is visible to all threads when it returns.
    """
    source, step = 0, 1
    while step < size:
        to = size - source

        def add(i: Expr, source: int = source, to: int = to, step: int = step) -> None:
            before = T.if_then_else(i >= step, sums[source + T.max(i - step, 0)], 0)
            T.buffer_store(sums, sums[source + i] + before, [to + i])

        each(size, threads, thread, add)
        barrier()
        source, step = to, step * 2
    return source
