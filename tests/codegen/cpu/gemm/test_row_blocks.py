"""The partition of rows into blocks: each row once, and no shorter block than needed."""

from __future__ import annotations

import pytest
import torch
import tvm
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.build import compile_kernels
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.gemm.row_blocks import each_row_block, row_blocks
from moec.target.cpu import host


@pytest.mark.parametrize("most", [2, 6])
def test_rows_are_shared_where_few_are_left(most: int) -> None:
    with kernel("blocks") as frame:
        n = T.int64()
        argument("x", (n,), "float32")
        y = argument("y", (3,), "int64")
        for i, number in enumerate(row_blocks(n, most)):
            T.buffer_store(y, number, [i])
    blocks = compile_kernels(frame.function, target=host())["blocks"]
    for rows in range(1, 5 * most):
        result = torch.zeros(3, dtype=torch.int64)
        blocks(*map(tvm.runtime.from_dlpack, (torch.zeros(rows), result)))
        full, part, rest = result.tolist()
        assert full * most + part + rest == rows
        shared = most > 2 and 0 < rows % most <= most // 2 and rows // most > 0
        assert (rest > 0) == shared
        assert not shared or (rest == (most + rows % most) // 2 and part - rest in (0, 1))


@pytest.mark.parametrize("most", [2, 6])
def test_each_row_is_in_one_block_and_each_height_has_one_body(most: int) -> None:
    heights = []
    with kernel("blocks") as frame:
        n = T.int64()
        argument("x", (n,), "float32")
        y = argument("y", (n,), "int64")

        def count(row: Expr, m: int) -> None:
            heights.append(m)
            for i in range(m):
                T.buffer_store(y, y[row + i] + 1, [row + i])

        each_row_block(n, most, count)
    assert sorted(heights) == list(range(1, most + 1))
    blocks = compile_kernels(frame.function, target=host())["blocks"]
    for rows in range(5 * most):
        result = torch.zeros(rows, dtype=torch.int64)
        blocks(*map(tvm.runtime.from_dlpack, (torch.zeros(rows), result)))
        assert result.tolist() == [1] * rows
