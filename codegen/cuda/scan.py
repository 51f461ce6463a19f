"""Running sums by the threads of one block, in shared memory (Hillis and Steele, 1986)."""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import barrier


def each(size: int, threads: int, thread: Expr, body: Callable[[Expr], None]) -> None:
    """body(i) for 0 <= i < size, each by one thread."""
    for turn in range(-(-size // threads)):
        i = T.bind(thread + turn * threads)
        with T.If(i < size), T.Then():
            body(i)


def running_sums(sums: Buffer, size: int, threads: int, thread: Expr) -> int:
    """sums[0 : size] -> their sums up to each, whose first index this returns: 0 or `size`.

    sums: int32[2 * size] in shared memory, complete before this is called, as after it.
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
