"""Rows that a warp reduces, and writes to computed positions by many threads, on emulated GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.capture import capture
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.codegen.package import build
from moec.ir.graph import Module
from moec.runtime.package import Package
from tests.codegen.loops.test_ops import INF, NAN, Many
from tests.cuda_emulator.bugs import Bug, check_found
from tests.cuda_emulator.emulate import SCHEDULES, SM_80, Schedule
from tests.cuda_emulator.models import EmulatedModel, emulated_model

WIDTH = 70  # two turns of a warp and a part of a third

# x, y: floats [T, 70] with NaN, infinities and ties; i: int64 [T, 70] from 0 to 5.
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "sum": lambda x, y, i: y.sum(1),
    "sum of all": lambda x, y, i: y.sum(),
    "sum of ints": lambda x, y, i: i.sum(1) + (x > 0).sum(1),
    "mean of rows": lambda x, y, i: y.mean(0),
    "sum of axes apart": lambda x, y, i: y.view(-1, 7, 10).sum((0, 2)),
    "product": lambda x, y, i: (1 + y / 64).prod(1),
    "extremes": lambda x, y, i: (x.amax(1), x.amin(1), y.amax(1), y.double().amin(1)),
    "any and all": lambda x, y, i: ((y > 2).any(1), (y > -2).all(1)),
    "argmax": lambda x, y, i: (x.argmax(1), x.argmin(1), i.argmax(1), i.argmin(1)),
    "max": lambda x, y, i: (*y.max(1), *x.min(1)),
    "softmax": lambda x, y, i: (y.softmax(1), y.log_softmax(1), y.logsumexp(1)),
    "softmax of doubles": lambda x, y, i: y.double().softmax(1),
    "variance": lambda x, y, i: torch.var_mean(y, 1),
    "norms": lambda x, y, i: (y.norm(dim=1), y.norm(1, dim=1), y.norm(INF, dim=1)),
    "layer norm": lambda x, y, i: F.layer_norm(y, (WIDTH,), y[0] * 0 + 2, y[0] * 0 + 1),
    "scatter": lambda x, y, i: y.scatter(1, i, y + 1),
    "scatter add": lambda x, y, i: y.scatter_add(1, i, y),
    "scatter of one axis": lambda x, y, i: y[:, 0].scatter_add(0, i[:, 0] % y.shape[0], y[:, 1]),
    "add at": lambda x, y, i: torch.zeros(6, WIDTH).index_add(0, i[:, 0], y),
    "put": lambda x, y, i: y.index_put((i[:, 0] % y.shape[0], i[:, 1]), y[:, 0]),
    "put rows": lambda x, y, i: y.index_put((i[:, 0] % y.shape[0],), y, accumulate=True),
    "histogram": lambda x, y, i: torch.histc(i.float(), bins=5, min=0, max=4),
}


def inputs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(rows, WIDTH, generator=generator) for _ in range(2))
    x = (x * 4).round() / 4  # ties, between lanes too
    for row, columns in enumerate(([], [3], [40, 69], [1, 33], [64])[:rows]):
        x[row, columns] = NAN
    x[-1, 65], x[-1, 66] = INF, -INF
    return {"x": x, "y": y, "i": torch.randint(0, 6, (rows, WIDTH), generator=generator)}


@cache
def package(names: tuple[str, ...]) -> Package:
    rows = {0: torch.export.Dim("T", min=2)}
    example = tuple(inputs(6).values())
    shapes = dict.fromkeys(("x", "y", "i"), rows)
    graph = capture(Many([FUNCTIONS[name] for name in names]), example, dynamic_shapes=shapes)
    return build(Module.of(graph.program), SM_80, backend=CUDA_TEXT)


def errors(
    names: tuple[str, ...], run: EmulatedModel, rows: int, schedule: Schedule = SCHEDULES[0]
) -> list[str]:
    """The functions whose results differ: sums are in another order than torch's."""
    arguments = inputs(rows)
    read = {port.name: arguments[port.name] for port in run.executor.package.main.inputs}
    values = iter(run(read, schedule=schedule).values())
    wrong = []
    for name in names:
        expected = FUNCTIONS[name](*arguments.values())
        for part in expected if isinstance(expected, tuple) else (expected,):
            value = next(values)
            assert value.dtype == part.dtype, name
            if not torch.allclose(value, part, rtol=2e-5, atol=1e-5, equal_nan=True):
                wrong.append(name)
    return wrong


def test_equal_torch() -> None:
    names = tuple(FUNCTIONS)
    run = emulated_model(package(names))
    assert [errors(names, run, 5, schedule) for schedule in SCHEDULES] == [[]] * 4
    assert [errors(names, run, rows) for rows in (2, 40)] == [[]] * 2


FEW = ("softmax", "argmax", "put")
BUGS = (
    Bug("half of the lanes are left out", r"(__shfl_xor_sync\(.*), 16\)", r"\1, 0)"),
    Bug("the tail of a row is not read", r"\(\(101 - ", "((70 - "),
    Bug(
        "writes are made in reverse",
        r"for \(int64_t (v_\d+) = \(int64_t\)0; \1 < v; \+\+\1\)",
        r"for (int64_t \1 = v - 1; \1 >= 0; --\1)",
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_bugs_are_found(bug: Bug) -> None:
    run = emulated_model(package(FEW), bug.plant)
    check_found(bug, lambda schedule: not errors(FEW, run, 40, schedule))
