"""Attention on tensor cores, emulated, against torch under all schedules, and inserted bugs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from moec.codegen.cuda.attention.key_tiles import KeyTile, key_tile
from moec.codegen.cuda.attention.tiles import FEW_QUERIES, tile_attention
from moec.codegen.specs.attention import AttentionSpec, MaskSpec
from moec.errors import NoMatch
from tests.cuda_emulator.bugs import WHERE_LATE, Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    Schedule,
    emulated,
    needs_compiler,
)

pytestmark = needs_compiler

TILE = KeyTile(1, 16, 64)
"""Few keys at a time, so that few keys are several tiles."""


@dataclass(frozen=True)
class Case:
    """`queries` of two texts attend to `keys` keys; `first` are their positions in a cache."""

    spec: AttentionSpec
    queries: int
    keys: int
    tile: KeyTile | None = TILE
    first: tuple[int, int] | None = None


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
    "all-keys": Case(AttentionSpec("bf16", 2, 2, 16, 64, 0.25), 18, 70, tile=None),
}


@cache
def kernel(name: str, bug: Bug | None = None) -> Emulated:
    case = CASES[name]
    few = FEW_QUERIES if case.spec.placed else 0
    function = tile_attention(case.spec, SM_80, few=few, tile=case.tile)
    return emulated(function, change=bug.plant if bug else str)


def error(run: Emulated, case: Case, schedule: Schedule) -> float:
    """The greatest error, in roundings of the greatest value: the weights and the result are each
    rounded once."""
    spec = case.spec
    generator = torch.Generator().manual_seed(3)
    dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float16

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = random(2, spec.q_heads, case.queries, spec.key_dim)
    k = random(2, spec.kv_heads, case.keys, spec.key_dim)
    v = random(2, spec.kv_heads, case.keys, spec.value_dim)
    tensors = {"q": q, "k": k, "v": v}
    sizes = (2, spec.q_heads, case.queries, case.keys)
    mask = sinks = None
    if spec.mask is not None:
        shape = [size if full else 1 for size, full in zip(sizes, spec.mask.full, strict=True)]
        mask = torch.randn(shape, generator=generator)
        mask = mask.masked_fill(mask < 0, -torch.inf)
        mask[..., 3, :] = -torch.inf  # a query that attends to no key
        mask = mask > 0 if spec.mask.dtype == "bool" else mask
    if spec.sinks:
        sinks = random(spec.q_heads)
    expected = meaning(case, q.float(), k.float(), v.float(), mask, sinks)
    if case.first is not None:
        for b, first in enumerate(case.first):
            k[b, :, first + case.queries :] = torch.nan
            v[b, :, first + case.queries :] = torch.nan
    out = torch.full_like(expected, torch.nan, dtype=dtype)
    tensors["out"] = out
    arguments = [
        t.transpose(1, 2).contiguous() if name in spec.tokens_first else t
        for name, t in tensors.items()
    ]
    optional = [t for t in (mask, sinks) if t is not None]
    if case.first is not None:
        optional.append(torch.tensor(case.first))
    run(*arguments[:3], *optional, arguments[3], schedule=schedule)
    result = arguments[3].transpose(1, 2) if "out" in spec.tokens_first else arguments[3]
    rounding = torch.finfo(dtype).eps / 2
    return float((result.float() - expected).abs().max() / v.nan_to_num().abs().max() / rounding)


def meaning(
    case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """By the definition in AttentionSpec, all scores at once."""
    spec = case.spec
    k, v = (t.repeat_interleave(spec.group, 1) for t in (k, v))
    scores = q @ k.mT * spec.scale
    first = torch.tensor(case.first or (0, 0))[:, None, None, None]
    at, s = torch.arange(case.keys), first + torch.arange(case.queries)[:, None]
    visible = (at <= s) if spec.is_causal else torch.ones(scores.shape, dtype=torch.bool)
    if spec.window is not None:
        visible = visible & (at > s - spec.window)
    if spec.chunk is not None:
        visible = visible & (at // spec.chunk == s // spec.chunk)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1).nan_to_num()[..., : case.keys] @ v


def is_right(run: Emulated, name: str, schedule: Schedule) -> bool:
    return error(run, CASES[name], schedule) <= 2


@pytest.mark.parametrize("name", CASES)
def test_schedules(name: str) -> None:
    for schedule in SCHEDULES:
        assert is_right(kernel(name), name, schedule), schedule


def test_no_keys_and_no_texts() -> None:
    """Zeros, and nothing."""
    spec = CAUSAL
    for batch, keys in ((1, 0), (0, 5)):
        q = torch.ones(batch, 4, 20, 32, dtype=torch.bfloat16)
        k = torch.ones(batch, 2, keys, 32, dtype=torch.bfloat16)
        out = torch.full((batch, 4, 20, 16), torch.nan, dtype=torch.bfloat16)
        kernel("causal")(q, k, k[..., :16].contiguous(), out)
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
    check_found(bug, lambda schedule: is_right(kernel("causal", bug), "causal", schedule))


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
