"""Products whose k is split over blocks, emulated: routings, tails, schedules, bugs; and which are
split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moec.codegen.cuda.activation import gated, silu
from moec.codegen.cuda.gemm.grouped import grouped_linear, linear
from moec.codegen.cuda.gemm.split_blocks import can_split, memory_of
from moec.codegen.cuda.gemm.tiles import FLOATS, LARGE, SMALL, TileShape
from moec.codegen.specs.products import LinearSpec
from moec.target.cuda import TARGETS
from tests.codegen.cuda.gemm.test_gemv import right
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    Schedule,
    emulated,
    needs_compiler,
)
from tests.cuda_emulator.products import is_dense_product
from tests.cuda_emulator.routings import Routed, routed

SHAPE = TileShape(16, 32, 32, warp_rows=1, warp_columns=1, stages=2)
SIX = replace(SM_80, sms=6)
"""So few SMs that some numbers of rows are split and others are not."""
DENSE = LinearSpec(40, 200, "float32", bias=True)  # tails of columns and of k
HALF = LinearSpec(11, 392, "bfloat16", "float32")
GATED = LinearSpec(16, 264, "bfloat16", groups=3, gated=True, bias=True)
NARROW = LinearSpec(24, 264, "float16", groups=3)


@dataclass(frozen=True)
class Split:
    """A kernel with its memory, which holds NaN before a call."""

    run: Emulated
    memory: tuple[int, int]

    def __call__(self, *tensors: Tensor, schedule: Schedule = SCHEDULES[0]) -> None:
        self.run(*tensors, torch.full(self.memory, torch.nan), schedule=schedule)


@cache
def kernel(spec: LinearSpec, bug: Bug | None = None) -> Split:
    memory = memory_of(spec, SIX, [SHAPE])
    assert memory is not None
    options: Any = {"shape": SHAPE, "splits": True}
    if spec.groups == 1:
        code = linear(spec, SIX, **options)
    else:
        join = gated(silu) if spec.gated else None
        code = grouped_linear(spec, SIX, epilogue=join, top_k=1, **options)
    return Split(emulated(code, change=bug.plant if bug else str), memory)


@needs_compiler
@pytest.mark.parametrize("spec", [DENSE, HALF], ids=["float32", "bfloat16"])
def test_dense_products(spec: LinearSpec) -> None:
    """In parts; no rows; and as many tiles as SMs, in one part."""
    for schedule, rows in zip(SCHEDULES, (5, 16, 0, 50), strict=True):
        assert is_dense_product(kernel(spec), spec, rows, schedule), rows


@needs_compiler
@settings(max_examples=15)
@given(case=routed(3, 9))
@pytest.mark.parametrize("spec", [GATED, NARROW], ids=["gated", "narrow"])
def test_any_routing(spec: LinearSpec, case: Routed) -> None:
    assert right(kernel(spec), spec, case.experts, case.schedule, case.nan)


BUGS = (
    Bug("parts are added before they are complete", r"__syncthreads\(\);", ";", last=True),
    Bug("the last parts are left out", r"< \(\(\(cse_v\d+ \+ 7\)", "< (((1 + 7)"),
    Bug("parts have the same steps", r"\(\(12 / cse_v\d+\) \+ 1\)\)", "0)"),
    Bug("parts have the same place", r"\(\(\(int\)blockIdx\.x\) \* 512\)", "(0 * 512)"),
)


@needs_compiler
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    check_found(bug, lambda schedule: is_dense_product(kernel(DENSE, bug), DENSE, 5, schedule))


H100 = TARGETS["cuda:sm_90a"]


@pytest.mark.parametrize(
    ("spec", "shape", "splits"),
    [
        # The router of DeepSeek-V3; Qwen3's output projection for a prompt; a head.
        (LinearSpec(256, 7168, "float32"), SMALL, True),
        (LinearSpec(256, 7168, "float32"), FLOATS, True),
        (LinearSpec(2048, 4096, "bfloat16"), LARGE, True),
        (LinearSpec(151936, 2048, "bfloat16"), LARGE, False),
        (LinearSpec(256, 128, "float32"), SMALL, False),
        # Mixtral's experts have tiles enough, four narrow ones do not.
        (LinearSpec(4096, 14336, "bfloat16", groups=8), SMALL, False),
        (LinearSpec(1024, 4096, "bfloat16", groups=4), SMALL, True),
    ],
)
def test_which_products_are_split(spec: LinearSpec, shape: TileShape, splits: bool) -> None:
    assert can_split(spec, H100, shape) == splits
    rows = shape.rows * shape.columns
    assert memory_of(spec, H100, [shape]) == ((132, rows) if splits else None)


def test_without_memory_nothing_is_split() -> None:
    assert memory_of(LinearSpec(151936, 2048, "bfloat16"), H100, [SMALL, LARGE]) is None
    both = memory_of(LinearSpec(256, 7168, "float32"), H100, [SMALL, FLOATS])
    assert both == (132, 128 * 64)
