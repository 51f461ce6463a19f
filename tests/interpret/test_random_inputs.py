"""Random ids: any row of the table but those that are all zero."""

from __future__ import annotations

import pytest
import torch

from moec.interpret.random_inputs import random_like
from moec.ir.graph import Program
from moec.ir.text import parse

GRAPH = """
graph main(ids: i64[B]; table: f32[6, 3]) {
  size B in [1, 4096]
  x: f32[B, 3] = aten.embedding.default(table, ids)
  return x
}
"""


@pytest.mark.parametrize(
    ("zero", "expected"), [((1, 4), {0, 2, 3, 5}), ((0, 1, 2, 3, 4, 5), {0, 1, 2, 3, 4, 5})]
)
def test_ids_of_rows_that_are_all_zero_are_left_out(
    zero: tuple[int, ...], expected: set[int]
) -> None:
    table = torch.ones(6, 3)
    table[2, 0] = table[3, :2] = table[5, 1:] = 0  # not all of them is zero
    table[0, 0] = torch.nan
    table[list(zero)] = 0
    program = Program(parse(GRAPH), {"table": table})
    example = [torch.zeros(500, dtype=torch.int64)]
    (ids,) = random_like(program, example, torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == expected
