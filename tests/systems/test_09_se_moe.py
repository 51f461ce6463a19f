"""SE-MoE: tasks with batches of any sizes share one artifact, whose experts have no capacity;
devices are assigned to tasks by their loads."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import pytest
import torch

from docs.systems import Figure, Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("09_se_moe")
SOURCE = Source(
    number=9,
    title="SE-MoE",
    paper="2205.10034",
    example="09_se_moe",
    process="encoder",
    modalities=("image",),
    adds="The rows of all tasks meet in the same experts, in any mixture, and each task's batch is "
    "a named size. The authors' capacity is not divided by the experts: it cannot bind, and is "
    "gone. Rails of the exchanges are `moec plan`'s; ring memory is not part of this.",
    trained="scikit-learn's digits",
)
TOLERANCE = 1e-5  # float32, two layers of short sums
SMALL = {"width": 8, "hidden": 12, "experts": 3, "layers": 1}


@functools.cache
def compiled(gate: str) -> tuple[Any, CompiledModel]:
    torch.manual_seed(0)
    model = example.UFO(example.Sizes(gate=gate, **SMALL)).eval()
    return model, example.compiled(model)


@pytest.mark.parametrize("gate", ["switch", "gshard"])
@pytest.mark.parametrize("loads", [(32, 16, 8, 8), (0, 0, 5, 0), (1, 1, 1, 40)], ids=str)
def test_any_mixture_of_tasks(gate: str, loads: tuple[int, ...]) -> None:
    model, artifact = compiled(gate)
    images, _ = example.batches(loads)
    with torch.no_grad():
        expected = model(*images)
    for output, eager in zip(artifact(*images), expected, strict=True):
        torch.testing.assert_close(output, eager, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("gate", "router"),
    [("switch", "softmax, top-1"), ("gshard", "softmax, top-2, renormalised")],
)
def test_recognised_without_a_limit(gate: str, router: str) -> None:
    _, artifact = compiled(gate)
    (block,) = artifact.blocks
    assert (block.experts, block.router) == (3, router)
    assert not any(op.name == "moe.capacity" for op in artifact.pass_results[-1].program.graph.ops)


def test_losses_and_noise_are_not_compiled() -> None:
    names = {op.name for op in compiled("gshard")[1].captured.program.graph.ops}
    assert not any("rand" in name for name in names)


def test_it_learns_all_tasks() -> None:
    """Chance is a loss of log 10 + 2 log 2 + log 3 = 4.8."""
    torch.manual_seed(0)
    model = example.UFO(example.Sizes(**SMALL))
    losses = example.train(model, (32, 16, 8, 8), 60)
    assert losses[0] > 4.5
    assert sum(losses[-10:]) / 10 < 4.2


def test_devices_are_given_by_load() -> None:
    """Heavy tasks are split, light ones share; each device has the same number of rows."""
    loads = example.PUBLISHED_LOADS
    shares = example.devices_of(loads, 8)
    rows = [sum(part * load for part, load in zip(row, loads, strict=True)) for row in shares]
    assert rows == [128] * 8
    assert [sum(row[task] for row in shares) for task in range(4)] == [1] * 4
    assert sum(1 for row in shares if row[0]) == 4
    merged = example.devices_of((10, 10, 10, 90), 2)
    assert merged[0] == [1, 1, 1, Fraction(1, 3)]
    alone = [[Fraction(int(i == j)) for j in range(4)] for i in range(4)]
    assert example.throughput(loads, alone) == 0.5
    assert example.throughput(loads, shares) == 1.0


def test_record(keep: Keep) -> None:
    figures = [
        Figure(
            "rows a device by load, over a device a task",
            "2.00 x, counted",
            "74.0 / 62.6 = 1.18 x",
            "rows counted, not timed",
        ),
    ]
    keep(record_of(compiled("switch")[1], SOURCE, f"{TOLERANCE:g}", figures))
