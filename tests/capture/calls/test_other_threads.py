"""Threads that compile models at once, which share classes and globals."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

import moec

X = torch.arange(12.0).reshape(3, 4)
CALLS = [0]
SCALE = 2.0
HISTORY: list[int] = [3]


class Shared(nn.Module):
    """Counts in a class attribute and in globals."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        global SCALE
        Shared.calls += 1
        SCALE += 1.0
        CALLS[0] += 1
        HISTORY.append(x.shape[0])
        return x * 2


def start() -> None:
    global SCALE
    SCALE, CALLS[0], HISTORY[:], Shared.calls = 2.0, 0, [3], 0


def test_two_threads_compile_models_that_share_a_class() -> None:
    start()
    modules = [Shared().eval() for _ in range(2)]
    compiled: list[Any] = [None, None]

    def compile_one(number: int) -> None:
        compiled[number] = moec.compile(modules[number], (X,), build=False, verify=False)

    threads = [threading.Thread(target=compile_one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(compiled)
    assert (Shared.calls, SCALE, CALLS, HISTORY) == (0, 2.0, [0], [3])
