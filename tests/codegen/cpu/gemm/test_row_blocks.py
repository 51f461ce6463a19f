"""The partition of rows into blocks: each row once, and no shorter block than needed."""

from __future__ import annotations

import pytest
import torch
import tvm
from tvm.script.ir_builder import tirx as T

from moec.codegen.build import compile_kernels
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.gemm.row_blocks import halves, row_blocks
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
        assert not shared or (rest in halves(most) and part - rest in (0, 1))
