"""Attention on the emulator against torch, under all schedules, and planted bugs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from moec.codegen.cuda.attention import attention
from moec.codegen.specs.attention import AttentionSpec
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import (
    SCHEDULES,
    SM_80,
    Emulated,
    Schedule,
    emulated,
    needs_compiler,
)

pytestmark = needs_compiler

# Two query heads share one of keys; features beyond a warp, and a tail.
CAUSAL = AttentionSpec("f32", 4, 2, 40, 24, 0.25, is_causal=True)
PLAIN = {
    "window": AttentionSpec("f32", 2, 2, 8, 8, 0.5, is_causal=True, window=3),
    "sinks": AttentionSpec("f32", 2, 1, 8, 8, 0.5, is_causal=True, sinks=True),
    "all-keys": AttentionSpec("f32", 2, 2, 8, 8, 0.5),
}


@cache
def kernel(spec: AttentionSpec, bug: Bug | None = None) -> Emulated:
    return emulated(attention(spec, SM_80), change=bug.plant if bug else str)


def meaning(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """By the definition in AttentionSpec, a score at a time."""
    k, v = (t.repeat_interleave(spec.group, 1) for t in (k, v))
    scores = q @ k.mT * spec.scale
    s, at = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
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


BUGS = (
    Bug("lanes are left out of a score", r"__shfl_xor_sync\(([^\n]*), 4\)", "0.0f"),
    Bug("scores are not scaled", r" \* 0x1p-2f/\*[^*]*\*/", ""),
    Bug("sums are not rescaled", r"expf\(\(_ptr_\d+\[0\] - v_\d+\)\)", "1.0f"),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    run = kernel(CAUSAL, bug)
    check_found(bug, lambda schedule: right(run, CAUSAL, schedule))
