"""What torch logs of a failed export is not shown: capture goes on in another way, or says why."""

from __future__ import annotations

import logging
import sys
import threading

import torch
from torch import nn

from moec.capture import capture
from moec.capture.calls.trials import quiet

SIZES = logging.getLogger("torch.fx.experimental.symbolic_shapes")


class SkipsUnusedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, y = x[:, :2].argmax(-1), torch.zeros_like(x)
        counts = torch.bincount(ids, minlength=2).tolist()
        for number, expert in enumerate(self.experts):
            if counts[number] == 0:
                continue
            rows = torch.where(ids == number)[0]
            y[rows] += expert(x[rows])
        return y


def test_nothing_is_logged() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    SIZES.addHandler(handler)
    try:
        capture(SkipsUnusedExperts().eval(), (torch.randn(6, 4),))
    finally:
        SIZES.removeHandler(handler)
    assert records == []
    assert not SIZES.disabled


def test_threads_are_silenced_one_after_the_other() -> None:
    streams = sys.stdout, sys.stderr
    second_entered, first_left = threading.Event(), threading.Event()

    def second() -> None:
        with quiet():
            second_entered.set()
            first_left.wait(10)

    thread = threading.Thread(target=second)
    with quiet():
        thread.start()
        assert not second_entered.wait(0.2)
    first_left.set()
    thread.join()
    assert (sys.stdout, sys.stderr) == streams
    assert not SIZES.disabled
