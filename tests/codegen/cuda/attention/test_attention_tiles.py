"""Attention on tensor cores, emulated, against torch under all schedules, and inserted bugs."""

from __future__ import annotations

import pytest
import torch

from moec.codegen.cuda.attention.key_tiles import key_tile
from moec.codegen.specs.attention import AttentionSpec, MaskSpec
from moec.errors import NoMatch
from tests.codegen.cuda.attention.attention_cases import (
    Case,
    check_bug,
    check_schedules,
    kernel,
)
from tests.cuda_emulator.bugs import WHERE_LATE, Bug

CAUSAL = AttentionSpec("bf16", 4, 2, 32, 16, 0.25, is_causal=True)
CASES = {
    # 37 queries of two heads: two tiles of rows, the second one not full.
    "causal": Case(CAUSAL, 37, 37),
    "window-sinks": Case(
        AttentionSpec(
            *("f16", 2, 2, 16, 32, 0.3, True),
            sinks=True,
            window=9,
            tokens_first=("q", "k", "v", "out"),
        ),
        *(50, 50),
    ),
    "chunk": Case(AttentionSpec("bf16", 3, 1, 16, 16, 0.25, True, chunk=20), 45, 45),
    "bool-mask": Case(
        AttentionSpec("bf16", 2, 1, 16, 16, 0.25, mask=MaskSpec("bool", (True, False, True, True))),
        *(19, 40),
    ),
    "float-mask": Case(
        AttentionSpec("f16", 2, 2, 16, 16, 0.25, mask=MaskSpec("f32", (False, True, True, True))),
        *(19, 24),
    ),
    # The cache is NaN beyond the positions that were written.
    "placed": Case(
        AttentionSpec("bf16", 4, 2, 32, 16, 0.25, True, window=30, placed=True),
        *(18, 70),
        first=(43, 0),
    ),
    # One token after others.
    "one query": Case(
        AttentionSpec("bf16", 6, 2, 32, 16, 0.25, True, placed=True), 1, 200, first=(180, 5)
    ),
    "all-keys": Case(AttentionSpec("bf16", 2, 2, 16, 64, 0.25), 18, 70, tile=None),
}


@pytest.mark.parametrize("name", CASES)
def test_schedules(name: str) -> None:
    check_schedules(CASES[name])


def test_no_keys_and_no_texts() -> None:
    """Zeros, and nothing."""
    spec = CAUSAL
    for batch, keys in ((1, 0), (0, 5)):
        q = torch.ones(batch, 4, 20, 32, dtype=torch.bfloat16)
        k = torch.ones(batch, 2, keys, 32, dtype=torch.bfloat16)
        out = torch.full((batch, 4, 20, 16), torch.nan, dtype=torch.bfloat16)
        kernel(CASES["causal"])(q, k, k[..., :16].contiguous(), out)
        assert not out.any()
    assert spec.group == 2


BUGS = (
    Bug(
        "tiles of keys are not waited for",
        r"ptx_cp_async_wait_group_async_wait_group_0\(\);",
        "ptx_cp_async_wait_group_async_wait_group_1();",
        WHERE_LATE,
    ),
    Bug("no barrier before a stage is read and loaded", r"__syncthreads\(\);", ";"),
    Bug("values are not transposed", r"x4_trans_shared", "x4_shared"),
    Bug("sums are not rescaled", r"exp2f\(\(_ptr_\d+\[v_\d+\] - v_\d+\)\)", "1.0f"),
    Bug(
        "lanes of a row have each their greatest score",
        r"__shfl_xor_sync\(([^,]*), ([^,]*), 2\)",
        r"\2",
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    check_bug(CASES["causal"], bug)


REFUSED = {
    "it computes in f32": AttentionSpec("f32", 4, 2, 32, 16, 0.25),
    "its keys have 24 features, not a multiple of 16": AttentionSpec("bf16", 4, 2, 24, 16, 0.25),
    "its values have 40 features": AttentionSpec("bf16", 4, 2, 32, 40, 0.25),
    "keys of 576 and values of 512 features do not fit": AttentionSpec("bf16", 4, 1, 576, 512, 0.1),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(words: str) -> None:
    with pytest.raises(NoMatch, match=words):
        key_tile(REFUSED[words])


@pytest.mark.parametrize(("key", "value"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_the_tile_of_a_width(key: int, value: int) -> None:
    tile = key_tile(AttentionSpec("bf16", 8, 2, key, value, 0.1))
    assert tile.rows == (128 if max(key, value) <= 128 else 64)
    assert tile.keys == (64 if max(key, value) <= 64 else 32)
