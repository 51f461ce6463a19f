"""Appending to a cache on the emulator against the op's reference, and inserted bugs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.codegen.cuda.append import append
from moec.codegen.specs.attention import AnglesSpec, AppendSpec
from moec.ir.ops.dense.rotary import rotate_pairs
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Emulated, Schedule, emulated

BATCH, ROOM, TOKENS, WIDTH = 2, 9, 3, 12
# Angles of whole rows for each token, and of half a row for each token of each text.
ANGLES = (
    AnglesSpec("f32", (False, False, True), WIDTH),
    AnglesSpec("f32", (True, False, True), WIDTH // 2),
)
SPECS = {
    "plain": AppendSpec("bf16", 3, WIDTH, tokens_first=True),
    "turned": AppendSpec("f32", 3, WIDTH, turns=(ANGLES[0], ANGLES[0])),
    "halves": AppendSpec("bf16", 3, WIDTH, tokens_first=True, turns=(ANGLES[1], ANGLES[1])),
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@cache
def kernel(name: str, bug: Bug | None = None) -> Emulated:
    return emulated(append(SPECS[name], SM_80), change=bug.plant if bug else str)


def right(run: Emulated, spec: AppendSpec, schedule: Schedule, first: tuple[int, int]) -> bool:
    generator = torch.Generator().manual_seed(3)
    dtype = DTYPES[spec.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys = random(BATCH, spec.heads, ROOM, WIDTH).to(dtype)
    rows = random(*spec.row(BATCH, spec.heads, TOKENS), WIDTH).to(dtype)
    angles: list[Any] = []
    for of in spec.turns or ():
        sizes = zip(of.full, (BATCH, spec.heads, TOKENS), strict=True)
        angles.append(random(*(size if full else 1 for full, size in sizes), of.width))
    new = rows.permute(0, 2, 1, 3) if spec.tokens_first else rows
    new = rotate_pairs(new, *angles) if angles else new
    expected = keys.clone()
    for text, start in enumerate(first):
        expected[text, :, start : start + TOKENS] = new[text]
    run(keys, rows, torch.tensor(first), *angles, schedule=schedule)
    # One float32 may differ by the rounding of a multiply-add; most are equal.
    return torch.allclose(keys.float(), expected.float(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_schedules(name: str) -> None:
    for schedule, first in zip(SCHEDULES, [(0, 0), (4, 1), (6, 6), (0, 6)], strict=True):
        assert right(kernel(name), SPECS[name], schedule, first)


BUGS = (
    Bug("rows are written from the start", r"_ptr\[", "0 * _ptr["),
    Bug("pairs are turned the other way", r"\) - \((v_\d+ \* v_\d+)\)", r") + (\1)"),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bugs(bug: Bug) -> None:
    run = kernel("halves", bug)
    check_found(bug, lambda schedule: right(run, SPECS["halves"], schedule, (4, 1)))


def test_rows_behind_the_room_stay_in_the_cache() -> None:
    """A request that the runtime never makes overwrites the last slot, and nothing else."""
    spec = SPECS["plain"]
    keys = torch.zeros(1, spec.heads, ROOM, WIDTH, dtype=torch.bfloat16)
    rows = torch.ones(*spec.row(1, spec.heads, TOKENS), WIDTH, dtype=torch.bfloat16)
    kernel("plain")(keys, rows, torch.tensor([ROOM + 5]))
    assert keys[:, :, -1].eq(1).all()
    assert keys[:, :, :-1].eq(0).all()


def test_no_tokens_and_no_room() -> None:
    spec = SPECS["plain"]
    keys = torch.zeros(1, spec.heads, 0, WIDTH, dtype=torch.bfloat16)
    rows = torch.ones(*spec.row(1, spec.heads, 1), WIDTH, dtype=torch.bfloat16)
    kernel("plain")(keys, rows, torch.tensor([0]))
    keys = torch.zeros(1, spec.heads, 2, WIDTH, dtype=torch.bfloat16)
    kernel("plain")(keys, rows[:, :0].contiguous(), torch.tensor([0]))
    assert keys.eq(0).all()
