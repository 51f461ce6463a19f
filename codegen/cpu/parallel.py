"""Parallel loops over tasks, and the decomposition of a task's number into indices.

Waking the other threads costs more than a small kernel takes. A `parallel_for` therefore uses all
threads only if its work, known at run time, is worth that; otherwise the calling thread does all of
it, without the pool. A task does the same in both cases, so the results have the same bits. There
is no third case: a pool runs a loop on all of its threads (pool.c in parts that they claim, TVM's
pool in one part each), or the loop runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tvm
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

WORTH = "moec.worth"
"""The attribute around a parallel loop that says whether to run it in parallel (outline.py)."""

WORTH_SHARING = 2**21
"""The least work of a loop that is shared among threads. The unit is a float32 multiply-add in
registers, or the reading of a byte of weights.

Measured on two cores of a Xeon (AVX512, AMX), other processes running: so much work takes one
thread 7 to 60 µs, in most kernels 20 to 40. Launching two threads costs 1.4 µs while the other
one still waits for work, and some 35 µs where it sleeps. Products of one row with 512 x 512
float32 (half of this) gained nothing from the second thread (5.4 to 9.4 against 6.4 µs), with
1024 x 512 (a little more than this) they did: 8 against 29 µs, or 42 after a pause.
"""
ELEMENT = 8
"""The work of reading, changing and writing one element, in multiply-adds."""


@contextmanager
def parallel_for(count: Expr | int, sums: Expr, weights: Expr | int = 0) -> Iterator[Var]:
    """A loop over `count` tasks, on all threads if its work is at least WORTH_SHARING: the number
    of multiply-adds `sums` plus `weights`, the bytes of weights or cached keys and values read."""
    worth = sums + weights >= T.int64(WORTH_SHARING)
    with T.attr(tirx.const(0, "int32"), WORTH, worth), T.parallel(0, count) as task:
        yield task


def bytes_of(buffer: Buffer) -> int:
    """The bytes of one element of a buffer."""
    return int(tvm.DataType(buffer.dtype).bits) // 8


def divide(task: Expr, parts: Expr) -> tuple[Expr, Expr]:
    """task // parts, task % parts; where `parts` is 0 there is no task.

    The division is hidden from TVM: it would conclude from `task` having a range that `parts`
    is not 0, shrink scratch buffers by such reasoning, and then divide by 0 for their size.
    """
    quotient = T.bind(T.call_extern("int64", "moec_quotient", task, parts))
    return quotient, T.bind(task - quotient * parts)
