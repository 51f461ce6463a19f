"""Dense products of few rows on the emulator against torch: tails, schedules, bugs; and which
products are split."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moec.codegen.cuda.compiler.source import lowered
from moec.codegen.cuda.gemm.grouped import linear
from moec.codegen.cuda.gemm.split_k import SplitK, split_k, split_of
from moec.codegen.specs.products import LinearSpec
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    emulated,
    needs_compiler,
)
from tests.cuda_emulator.products import TORCH, is_dense_product

# Tails of columns and of k: 520 elements are a second turn of 8 elements for the first warp.
TAILS = LinearSpec(22, 520, "bfloat16", "float32", bias=True)
WHOLE = LinearSpec(32, 512, "float16")
ODD = LinearSpec(11, 512, "bfloat16", bias=True)
SPLITS = {TAILS: SplitK(2, 4), WHOLE: SplitK(4, 8), ODD: SplitK(1, 4)}


@cache
def kernel(spec: LinearSpec, bug: Bug | None = None) -> Emulated:
    return emulated(split_k(spec, SPLITS[spec]), change=bug.plant if bug else str)


@needs_compiler
@pytest.mark.parametrize("spec", SPLITS, ids=["tails", "whole", "odd"])
def test_schedules(spec: LinearSpec) -> None:
    for schedule, rows in zip(SCHEDULES, (16, 5, 23, 1), strict=True):
        assert is_dense_product(kernel(spec), spec, rows, schedule)
    kernel(spec)(
        torch.empty(0, spec.k, dtype=TORCH[spec.dtype]),
        torch.zeros(spec.n, spec.k, dtype=TORCH[spec.dtype]),
        *([torch.zeros(spec.n, dtype=TORCH[spec.dtype])] if spec.bias else []),
        torch.empty(0, spec.n, dtype=TORCH[spec.y_dtype]),
    )


BUGS = (
    Bug("sums are read before all warps stored theirs", r"__syncthreads\(\);", ";"),
    Bug("k is permuted in one factor alone", r"(_ptr_6\[[^\]]*)\(v_19 \* 2\)", r"\1(1 - v_19) * 2"),
    Bug("the part of a warp is left out", r"_ptr_7\[[^\]]* \+ 512\)?\]", "0.0f"),
    Bug("rows beyond the end are stored", r"\(\(\(int\)threadIdx\.x\) >> 3\)\) < v\)", "0) < v)"),
)


@needs_compiler
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    check_found(bug, lambda schedule: is_dense_product(kernel(TAILS, bug), TAILS, 5, schedule))


@pytest.mark.parametrize(
    ("spec", "sms", "split"),
    [
        # Qwen3-30B-A3B on an H100: o_proj, k_proj, q_proj; a head of 151936 columns.
        (LinearSpec(2048, 4096, "bfloat16"), 132, SplitK(2, 8)),
        (LinearSpec(512, 2048, "bfloat16"), 132, SplitK(1, 16)),
        (LinearSpec(4096, 2048, "bfloat16"), 132, SplitK(4, 8)),
        (LinearSpec(151936, 2048, "bfloat16"), 132, None),
        (LinearSpec(128, 320, "bfloat16"), 132, SplitK(1, 2)),
        (LinearSpec(128, 128, "bfloat16"), 132, None),
        (LinearSpec(2048, 4096, "float32"), 132, None),
        (LinearSpec(2048, 4096, "bfloat16", groups=8), 132, None),
    ],
)
def test_which_products_are_split(spec: LinearSpec, sms: int, split: SplitK | None) -> None:
    assert split_of(spec, sms) == split


def test_a_dense_product_is_split_at_launch() -> None:
    """One launch of two: few rows with k split, many by tiles."""
    low = lowered(linear(LinearSpec(64, 512, "bfloat16"), SM_80), target=SM_80)
    block, threads = "blockIdx.x", "threadIdx.x"
    assert [launch.sizes for launch in low.launches] == [
        (block, "blockIdx.y", threads),
        (block, threads, "tirx.use_dyn_shared_memory"),
    ]
