"""Generated loops on emulated GPUs: the ops of tests/codegen/loops, at sizes 0, 1 and more."""

from __future__ import annotations

from functools import cache

import pytest

from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.codegen.package import build
from moec.ir.graph import Module
from tests.codegen.loops.test_ops import GROUPS, check, program
from tests.cuda_emulator.emulate import SCHEDULES, SM_80
from tests.cuda_emulator.models import EmulatedModel, emulated_model


@cache
def emulated(group: str, dtype: str) -> EmulatedModel:
    return emulated_model(build(Module.of(program(group, dtype)), SM_80, backend=CUDA_TEXT))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")  # the variance of no rows
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_equals_torch(group: str, rows: int) -> None:
    run = emulated(group, "f32")
    schedule = SCHEDULES[rows % 4]
    main = run.executor.package.main
    check(group, "f32", rows, main, lambda inputs: run(inputs, schedule=schedule))
