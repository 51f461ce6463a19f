"""While a model is captured, other threads run models that share its classes and globals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.capture.earlier_calls.check import earlier_calls

X = torch.arange(12.0).reshape(3, 4)
CALLS = [0]
SCALE = 2.0
HISTORY: list[int] = [3]


class Shared(nn.Module):
    """Counts in a class attribute and in globals, and reads them where `reads`."""

    calls = 0
    scale = torch.ones(4)

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        global SCALE
        Shared.calls += 1
        SCALE += 1.0
        CALLS[0] += 1
        HISTORY.append(x.shape[0])
        Shared.scale = torch.full((4,), 3.0)
        if not self.reads:
            return x * 2
        y = x * SCALE + Shared.calls - CALLS[0] % 5 + len(HISTORY) + sum(HISTORY)
        if Shared.calls > 1 and max(HISTORY) == 3 and HISTORY[0]:
            y = y * -Shared.calls / float(SCALE)
        for size in HISTORY[-2:]:
            y = y + size * [1, 2, 3, 4, 5][int(Shared.calls) % 5]
        return torch.add(y, Shared.scale, alpha=2)[: round(SCALE + 1)]


def of_thread(run: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def keep() -> None:
        try:
            results.append(run())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=keep)
    thread.start()
    thread.join()
    return results[0]


def start() -> None:
    global SCALE
    SCALE, CALLS[0], HISTORY[:], Shared.calls = 2.0, 0, [3], 0


def test_values_that_a_capture_may_not_read_are_plain_values_in_other_threads() -> None:
    captured, other = Shared(reads=False).eval(), Shared(reads=True).eval()
    start()
    expected = [other(X) for _ in range(4)]
    start()
    earlier = earlier_calls(captured, (X,), {})
    assert {"Shared.calls", "the global SCALE", "the global CALLS[0]"} <= {
        slot.words for slot in earlier.slots
    }
    with earlier.unread():
        assert type(Shared.calls) is not int
        actual = [of_thread(lambda: other(X)) for _ in range(4)]
    torch.testing.assert_close(actual, expected)


def test_two_threads_compile_models_that_share_a_class() -> None:
    start()
    modules = [Shared(reads=False).eval() for _ in range(2)]
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


@pytest.mark.parametrize("use", [int, float, str, bool, round, abs, "{}".format, hash, repr])
def test_a_value_is_itself_in_other_threads(use: Any) -> None:
    start()
    earlier = earlier_calls(Shared(reads=False).eval(), (X,), {})
    with earlier.unread():
        assert of_thread(lambda: use(Shared.calls)) == use(0)
