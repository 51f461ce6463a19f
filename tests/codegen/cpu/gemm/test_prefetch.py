"""Prefetching covers all weights, with about equally many in each step."""

from __future__ import annotations

import pytest
import torch
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.gemm.prefetch import Following, Stream, select_stream
from moec.target.cpu import host

COLUMNS, STEPS, MOST = 64, 40, 6


@pytest.mark.parametrize("begin", [0, 80])
@pytest.mark.parametrize("count", [1, 6, 7, 12, 31, 64, 500])
def test_rows_ask_for_all_weights_together(build, count, begin):
    """y[i] = where the block of row i begins to ask, and how far it goes with each step."""
    with kernel("asked") as frame:
        rows, n = T.int64(), T.int64()
        begin_of, y = argument("begin", (n,), "int64"), argument("y", (rows, 2), "int64")
        start = T.bind(begin_of[0])
        following = Following(T.int32(0), T.int32(0), 0, start, T.bind(start + STEPS))
        with T.serial(0, rows) as i:
            before = T.bind(T.truncdiv(i, T.int64(MOST)) * MOST)
            height = T.bind(T.min(rows - before, T.int64(MOST)))
            stream = following.share(before, height, rows, COLUMNS)
            T.buffer_store(y, stream.at(start)[-1], [i, 0])
            T.buffer_store(y, stream.each, [i, 1])
    y = torch.empty(count, 2, dtype=torch.int64)
    build(host(), frame.function)(torch.tensor([begin]), y)
    end = 0
    for before in range(0, count, MOST):
        at, each = y[before].tolist()
        assert at <= end  # no gap
        height = min(count - before, MOST)
        assert 0 <= each - height * COLUMNS / count < 1
        end = at + each * STEPS
    assert end >= COLUMNS * STEPS


@pytest.mark.parametrize("yes", [True, False])
def test_a_stream_is_chosen_whole(build, yes):
    with kernel("chosen") as frame:
        n = T.int64()
        y = argument("y", (n, 4), "int64")
        one, two = Stream(T.int32(1), T.int32(2), 3, 4, 5), Stream(n, n, n, n, n)
        for i, value in enumerate(select_stream(n == 1, one, two).at(T.int64(10))):
            T.buffer_store(y, value, [0, i])
    y = torch.empty(1 if yes else 2, 4, dtype=torch.int64)
    build(host(), frame.function)(y)
    assert y[0].tolist() == ([1, 2, 3, 4 + 10 * 5] if yes else [2, 2, 2, 2 + 10 * 2])
