"""Evaluations that take turns read each weight once, and compute what they compute alone."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from moec.ir.interpret.run_in_float32 import InFloat32
from moec.sources.memory.paged import PagedWeights, ReadsWeights
from moec.sources.memory.spool import Spool

WIDTH = 64
SIZE = WIDTH * WIDTH * 2


class Layers:
    """`count` weights bf16[WIDTH, WIDTH], of which two are in memory at a time."""

    def __init__(self, count: int) -> None:
        self.paged = PagedWeights(2 * SIZE, Spool())
        self.reads = [0] * count
        shape = torch.Size((WIDTH, WIDTH))
        self.weights = [
            self.paged.add(shape, torch.bfloat16, partial(self._read, n)) for n in range(count)
        ]

    def _read(self, number: int, tensor: Tensor) -> None:
        self.reads[number] += 1
        generator = torch.Generator().manual_seed(number)
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)

    def __call__(self, x: Tensor, skipped: int = -1) -> Tensor:
        for number, weight in enumerate(self.weights):
            if number != skipped:
                x = x + torch.tanh(x @ weight)
        return x


@pytest.fixture
def layers():
    return Layers(6)


def inputs(*rows: int) -> list[Tensor]:
    return [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in rows]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, InFloat32], ids=["native", "float32"])
def test_each_weight_is_read_once(layers, mode):
    def evaluate(x: Tensor, skipped: int) -> Tensor:
        with mode():
            return layers(x.bfloat16(), skipped)

    cases = list(zip(inputs(1, 7, 0, 19), (-1, 2, -1, 0), strict=True))
    evaluations = [partial(evaluate, *case) for case in cases]
    results = layers.paged.evaluate_together(evaluations)
    assert layers.reads == [1] * 6
    with ReadsWeights(layers.paged):
        alone = [evaluation() for evaluation in evaluations]
    assert layers.reads[-1] == 5
    assert all(map(torch.equal, results, alone))


def test_casts_are_shared_until_one_is_written_to(layers):
    casts = []

    def evaluate(writes: bool) -> Tensor:
        (weight,) = layers.weights[:1]
        cast = weight.to(torch.float32)
        casts.append(cast.data_ptr())
        return cast.mul_(2) if writes else cast + 0

    first, second, third = layers.paged.evaluate_together(
        [partial(evaluate, w) for w in (False, True, False)]
    )
    assert casts[0] == casts[1] != casts[2]
    assert torch.equal(first, third)
    assert torch.equal(2 * first, second)


def test_the_first_error_is_raised_and_no_thread_stays(layers):
    def fail(words: str) -> Tensor:
        layers(torch.ones(1, WIDTH, dtype=torch.bfloat16))
        raise ValueError(words)

    before = threading.active_count()
    x = torch.ones(2, WIDTH, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one"):
        layers.paged.evaluate_together(
            [partial(layers, x), partial(fail, "one"), partial(fail, "two")]
        )
    assert threading.active_count() == before + 1  # that which reads weights
    assert layers.paged.lock_step is None


def test_evaluations_end_where_the_process_is_interrupted(layers):
    """They wait for weights then, and let go of what they hold."""
    left = []

    def evaluate(number: int) -> None:
        try:
            layers(torch.ones(1, WIDTH, dtype=torch.bfloat16), skipped=0)
            if number == 1:
                _thread.interrupt_main()
            for _ in range(1000):
                layers(torch.ones(1, WIDTH, dtype=torch.bfloat16))
        finally:
            left.append(number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            layers.paged.evaluate_together([partial(evaluate, n) for n in range(3)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(left) == [0, 1, 2]


def test_filters_of_warnings_are_put_back(layers):
    def evaluate(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return layers(x.bfloat16())

    before = list(warnings.filters)
    layers.paged.evaluate_together([partial(evaluate, x) for x in inputs(1, 2, 3)])
    assert warnings.filters == before
