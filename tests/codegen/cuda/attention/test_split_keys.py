"""Attention of few queries, the keys split over warps and blocks, emulated, against torch under all
schedules, and inserted bugs."""

from __future__ import annotations

import pytest
import torch

from moec.codegen.cuda.attention.tiles import FEW_QUERIES
from moec.codegen.specs.attention import AttentionSpec, MaskSpec
from tests.codegen.cuda.attention.attention_cases import (
    Case,
    check_bug,
    check_schedules,
    kernel,
    result,
)
from tests.cuda_emulator.bugs import WHERE_LATE, Bug
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    needs_compiler,
)

pytestmark = needs_compiler

PLACED = AttentionSpec("bf16", 6, 2, 32, 16, 0.25, True, placed=True)
CASES = {
    # Three parts; the second text has keys for one alone.
    "placed": Case(PLACED, 1, 200, first=(180, 5), few=FEW_QUERIES, tile=None),
    "one-part": Case(PLACED, 1, 100, first=(80, 0), few=FEW_QUERIES, tile=None),
    # 15 queries of two heads are two tiles of rows.
    "window-sinks": Case(
        AttentionSpec(
            *("f16", 4, 2, 16, 48, 0.3, True),
            sinks=True,
            window=70,
            placed=True,
            tokens_first=("q", "out"),
        ),
        *(15, 140),
        first=(100, 40),
        few=FEW_QUERIES,
        tile=None,
    ),
    "bool-mask": Case(
        AttentionSpec("bf16", 2, 1, 16, 16, 0.25, mask=MaskSpec("bool", (True, False, True, True))),
        *(2, 140),
        few=FEW_QUERIES,
        tile=None,
    ),
    "all-keys": Case(
        AttentionSpec("bf16", 2, 1, 16, 16, 0.25, sinks=True), 1, 130, few=FEW_QUERIES, tile=None
    ),
    "wide": Case(AttentionSpec("bf16", 1, 1, 256, 256, 0.1), 1, 70, few=FEW_QUERIES, tile=None),
}


@pytest.mark.parametrize("name", CASES)
def test_schedules(name: str) -> None:
    check_schedules(CASES[name])


def test_no_keys_and_no_texts() -> None:
    """Zeros, and nothing."""
    for batch, keys in ((1, 0), (0, 5)):
        q = torch.ones(batch, 2, 1, 16, dtype=torch.bfloat16)
        k = torch.ones(batch, 1, keys, 16, dtype=torch.bfloat16)
        out = torch.full((batch, 2, 1, 16), torch.nan, dtype=torch.bfloat16)
        sinks, memory = torch.zeros(2, dtype=torch.bfloat16), torch.empty(2 * 108 * 16, 18)
        kernel(CASES["all-keys"])(q, k, k, sinks, out, memory)
        assert not out.any()


BUGS = (
    Bug("no barrier before sums are joined", r"__syncthreads\(\);", ";"),
    Bug(
        "tiles of keys are not waited for",
        r"ptx_cp_async_wait_group_async_wait_group_0\(\);",
        "ptx_cp_async_wait_group_async_wait_group_1();",
        WHERE_LATE,
    ),
    Bug("parts of blocks are not rescaled", r"exp2f\(\(_ptr\[.*\] - condval\w*\)\)", "1.0f"),
    Bug("the last part is left out", r"(for \(int v_\d+ = 0; v_\d+ < cse_v\d+);", r"\1 - 1;"),
    Bug(
        "every block starts at the first part",
        r"\(\(int\)blockIdx\.x\) \* \(\(\(\(\(max",
        "0 * (((((max",
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    check_bug(CASES["placed"], bug)


def test_a_sink_that_every_block_counts() -> None:
    bug = Bug("a sink per block", r"\(\(\(int\)blockIdx\.x\) == 0\) && ", "")
    check_bug(CASES["window-sinks"], bug)


def test_the_same_bits_in_every_schedule() -> None:
    """Parts are added in their order, whichever block ends first."""
    first, *others = (result(kernel(CASES["placed"]), CASES["placed"], s) for s in SCHEDULES)
    assert all(torch.equal(first, other) for other in others)
