"""Attention on the emulator against torch, under all schedules, and inserted bugs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from moec.codegen.cuda.attention.warps import attention
from moec.codegen.specs.attention import AttentionSpec
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Emulated, Schedule, emulated

# Two query heads share one of keys; features beyond a warp, and a tail.
CAUSAL = AttentionSpec("f32", 4, 2, 40, 24, 0.25, is_causal=True)
PLAIN = {
    "window": AttentionSpec("f32", 2, 2, 8, 8, 0.5, is_causal=True, window=3),
    "sinks": AttentionSpec("f32", 2, 1, 8, 8, 0.5, is_causal=True, sinks=True),
    "all-keys": AttentionSpec("f32", 2, 2, 8, 8, 0.5),
}


# Placed in a cache of 20 places, where the warps of a block share a query.
PLACED = {
    "placed": AttentionSpec("f32", 4, 2, 40, 24, 0.25, is_causal=True, placed=True),
    "placed-window": AttentionSpec("f32", 2, 2, 8, 8, 0.5, True, window=3, placed=True),
    "placed-sinks": AttentionSpec("bf16", 2, 1, 8, 8, 0.5, True, sinks=True, placed=True),
}
ROOM, FIRST = 20, (14, 0)


@cache
def kernel(spec: AttentionSpec, bug: Bug | None = None) -> Emulated:
    return emulated(attention(spec, SM_80), change=bug.plant if bug else str)


def meaning(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, first: int = 0
) -> Tensor:
    """By the definition in AttentionSpec, a score at a time."""
    k, v = (t.repeat_interleave(spec.group, 1) for t in (k, v))
    scores = q @ k.mT * spec.scale
    s, at = first + torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    visible = (at <= s) if spec.is_causal else torch.ones_like(scores[0, 0], dtype=torch.bool)
    if spec.window is not None:
        visible = visible & (at > s - spec.window)
    scores = scores.masked_fill(~visible, -torch.inf)
    if spec.sinks:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return (torch.cat([scores, column], -1).softmax(-1)[..., :-1]) @ v
    return scores.softmax(-1) @ v


def right(run: Emulated, spec: AttentionSpec, schedule: Schedule) -> bool:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q = random(2, spec.q_heads, 5, spec.key_dim)
    k, v = (random(2, spec.kv_heads, 5, d) for d in (spec.key_dim, spec.value_dim))
    sinks = random(spec.q_heads)
    out = torch.full((2, spec.q_heads, 5, spec.value_dim), torch.nan)
    run(q, k, v, *([sinks] if spec.sinks else []), out, schedule=schedule)
    return torch.allclose(out, meaning(spec, q, k, v, sinks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [CAUSAL, *PLAIN.values()], ids=["causal", *PLAIN])
def test_schedules(spec: AttentionSpec) -> None:
    assert all(right(kernel(spec), spec, schedule) for schedule in SCHEDULES)


def right_placed(run: Emulated, spec: AttentionSpec, schedule: Schedule, queries: int) -> bool:
    generator = torch.Generator().manual_seed(3)
    dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = random(2, spec.q_heads, queries, spec.key_dim)
    k, v = (random(2, spec.kv_heads, ROOM, d) for d in (spec.key_dim, spec.value_dim))
    sinks = random(spec.q_heads)
    out = torch.full((2, spec.q_heads, queries, spec.value_dim), torch.nan, dtype=dtype)
    arguments = (q, k, v, *([sinks] if spec.sinks else []), torch.tensor(FIRST))
    run(*arguments, out, schedule=schedule)
    wide = [tensor.float() for tensor in (q, k, v, sinks)]
    texts = [
        meaning(spec, *(t[b : b + 1] for t in wide[:3]), wide[3], FIRST[b])  # type: ignore[misc]
        for b in range(2)
    ]
    # bf16: rounded once at the end.
    near = 2**-7 if spec.dtype == "bf16" else 1e-4
    return torch.allclose(out.float(), torch.cat(texts), rtol=near, atol=near / 10)


@pytest.mark.parametrize("name", PLACED)
def test_queries_that_are_placed_in_a_cache(name: str) -> None:
    spec = PLACED[name]
    for schedule, queries in zip(SCHEDULES, (1, 2, 1, 5), strict=True):
        assert right_placed(kernel(spec), spec, schedule, queries)


JOIN_BUGS = (
    Bug("no barrier before parts are joined", r"__syncthreads\(\);", ";"),
    Bug("a part is not rescaled", r"expf\(\(_ptr_9\[0\] - v_\d+\)\)", "1.0f"),
    Bug("every warp counts the sink", r"threadIdx\.x\) >> 5\) == 0", "threadIdx.x) >> 5) >= 0"),
)


@pytest.mark.parametrize("bug", JOIN_BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs_of_shared_queries(bug: Bug) -> None:
    spec = PLACED["placed-sinks"]
    run = kernel(spec, bug)
    check_found(bug, lambda schedule: right_placed(run, spec, schedule, 1))


BUGS = (
    Bug("lanes are left out of a score", r"__shfl_xor_sync\(([^\n]*), 4\)", "0.0f"),
    Bug("scores are not scaled", r" \* 0x1p-2f/\*[^*]*\*/", ""),
    Bug("sums are not rescaled", r"expf\(\(_ptr_\d+\[0\] - v_\d+\)\)", "1.0f"),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    run = kernel(CAUSAL, bug)
    check_found(bug, lambda schedule: right(run, CAUSAL, schedule))
