"""Norms on the emulator against torch, under all schedules, and inserted bugs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.codegen.cuda.norm import norm
from moec.codegen.specs.norm import NormSpec
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Emulated, Schedule, emulated

WIDTH = 300  # three warps, and a tail
RMS = NormSpec("rms", WIDTH, 1e-6, "f32", "f32", "f32", residual=True)
LAYER = NormSpec("layer", WIDTH, 1e-5, "f32", "f32", "f32", bias="f32")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def rms_is_right(run: Emulated, schedule: Schedule) -> bool:
    """With a residual, whose sum is a result too; no token as well."""
    for tokens in (3, 0):
        x, residual, weight = random(tokens, WIDTH), random(tokens, WIDTH) / 2, random(WIDTH)
        total, out = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        run(x, residual, weight, total, out, schedule=schedule)
        expected = torch.nn.functional.rms_norm(x + residual, (WIDTH,), weight, 1e-6)
        if not (torch.equal(total, x + residual) and torch.allclose(out, expected, atol=1e-5)):
            return False
    return True


def layer_is_right(run: Emulated, schedule: Schedule) -> bool:
    x, weight, bias = random(3, WIDTH) + 2, random(WIDTH), random(WIDTH)
    out = torch.full_like(x, torch.nan)
    run(x, weight, bias, out, schedule=schedule)
    expected = torch.nn.functional.layer_norm(x, (WIDTH,), weight, bias, 1e-5)
    return torch.allclose(out, expected, atol=1e-5)


def test_schedules() -> None:
    rms, layer = emulated(norm(RMS, SM_80)), emulated(norm(LAYER, SM_80))
    assert all(rms_is_right(rms, schedule) for schedule in SCHEDULES)
    assert all(layer_is_right(layer, schedule) for schedule in SCHEDULES)


BUGS = (
    Bug("a warp is left out of the sum", r" \+ _ptr_(\d+)\[2\]\)", ")"),
    Bug("lanes are left out of the sum", r"__shfl_xor_sync\(([^\n]*), 8\)", "0.0f"),
    Bug("the tail of a row is read", r"if \(\(\(int\)threadIdx\.x\) < 12\) \{", "if (true) {"),
    Bug("no barrier before sums are read", r"__syncthreads\(\);", "", last=True),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    run = emulated(norm(LAYER, SM_80), change=bug.plant)
    check_found(bug, lambda schedule: layer_is_right(run, schedule))
