"""A module may count its calls; a result that depends on them is refused, with the line."""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moec
from moec.capture.behaviour.describe import Declared
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.errors import CaptureError

CALLS = 0
X = torch.randn(3, 4)


def counter() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


class Keeping(nn.Module):
    """Keeps values of every kind that a test needs."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.count, self.turn, self.mean, self.scale = 0, 0, 0.0, 1.0
        self.warm = False
        self.history: list[Any] = []
        self.recent: deque[int] = deque(maxlen=3)
        self.stats = defaultdict(float)
        self.last: torch.Tensor | None = None
        self.ticks, self.step = itertools.count(), counter()
        self.array, self.rng = np.zeros(2), np.random.default_rng(0)


class Count(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) * (2.0 if self.count > 60 else 1.0)


class Factor(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) * (1 + self.count / 100)


class Grown(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(x.shape[0])
        return self.linear(x) * (2.0 if len(self.history) > 60 else 1.0)


class Handler(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stats["calls"] += 1
        return self.linear(x) * (2.0 if self.stats["calls"] % 61 == 0 else 1.0)


class Last(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) if self.last is None else self.linear(x) + self.last
        self.last = x
        return y


class Turn(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.turn = 1 - self.turn
        return self.linear(x) * [1.0, 2.0][self.turn]


class Later(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * self.scale
        self.count += 1
        if self.count == 60:
            self.scale = 2.0
        return y


class Global(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global CALLS
        CALLS += 1
        return self.linear(x) * min(CALLS, 60)


class OfClass(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return self.linear(x) * (2.0 if type(self).calls > 60 else 1.0)


class Closure(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (2.0 if self.step() > 60 else 1.0)


class Ticks(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (2.0 if next(self.ticks) > 60 else 1.0)


class Array(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.array[0] += 1
        return self.linear(x) * float(self.array[0])


class Chance(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (2.0 if random.random() > 0.9 else 1.0)


class Generator(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.rng.random()


class Clock(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (2.0 if time.time() > 4e9 else 1.0)


class Text(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) * (2.0 if int(str(self.count)) > 60 else 1.0)


class Format(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) * (2.0 if len(f"call {self.count}") > 8 else 1.0)


class Percent(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) * (2.0 if len("%d" % self.count) > 3 else 1.0)  # noqa: UP031


REFUSED = {
    Text: ("self.count", "int(str(self.count))"),
    Percent: ("self.count", '"%d" % self.count'),
    Format: ("self.count", 'f"call {self.count}"'),
    Count: ("self.count", "if self.count > 60"),
    Factor: ("self.count", "1 + self.count / 100"),
    Grown: ("self.history", "len(self.history)"),
    Last: ("self.last", "+ self.last"),
    Turn: ("self.turn", "[self.turn]"),
    Global: ("the global CALLS", "min(CALLS, 60)"),
    OfClass: ("OfClass.calls", "type(self).calls > 60"),
    Closure: ("count", "return count"),
    Array: ("self.array", "self.array[0]"),
}
NOTED = {
    Handler: 'self.stats["calls"] % 61',
    Later: "if self.count == 60:",
    Ticks: "next(self.ticks) > 60",
    Chance: "random.random() > 0.9",
    Clock: "time.time() > 4e9",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_result_that_depends_on_earlier_calls_is_refused_with_the_line(kind: Any) -> None:
    source, code = REFUSED[kind]
    module = kind().eval()
    before = repr({key: value for key, value in vars(module).items() if key[0] != "_"})
    with pytest.raises(CaptureError) as refusal:
        earlier_calls(module, (X,), {})
    first, line, *remedy = str(refusal.value).split("\n")
    assert first.endswith(f"its result depends on {source}, which changes from call to call")
    assert first.startswith(f"{kind.__name__} cannot be captured: ")
    assert "test_earlier_calls.py:" in line
    assert code in line
    assert "make it an argument of the module" in remedy[-1]
    assert before == repr({key: value for key, value in vars(module).items() if key[0] != "_"})


@pytest.mark.parametrize("kind", NOTED)
def test_what_no_run_shows_is_noted_with_the_line(kind: Any) -> None:
    """The branch would be taken in the 60th call, or by chance."""
    random.seed(1)  # its first numbers are less than 0.9
    compiled = moec.compile(kind().eval(), (X,), verify=False, build=False)
    (note,) = [note for note in compiled.report().notes if NOTED[kind] in note]
    assert note.startswith("test_earlier_calls.py:")
    assert note.endswith("has the value of the capture in every call")


def test_results_that_differ_with_the_same_inputs_are_refused() -> None:
    with pytest.raises(CaptureError, match="two calls with the same inputs give different results"):
        earlier_calls(Generator().eval(), (X,), {})


class Counters(Keeping):
    """Counts, stores and prints, without an effect on the result."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        y = self.linear(x)
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.shape[0]
        self.stats["seconds"] += time.perf_counter() - start
        self.history.append(self.count)
        self.recent.append(x.shape[0])
        self.warm = not self.warm
        self.last = y
        if self.count % 100 == 0:
            print("call %d" % self.count, f"{self.mean:.2f}")  # noqa: UP031
        return y * (self.rng.random() if self.training else 1.0)


def test_what_is_only_counted_stored_or_printed_is_taken() -> None:
    module = Counters().eval()
    slots = {slot.words for slot in earlier_calls(module, (X,), {}).slots}
    assert {"self.count", "self.mean", "self.history", "self.last", "self.warm"} <= slots
    assert (module.count, module.history, module.last, len(module.stats)) == (0, [], None, 0)


def test_a_compilation_leaves_the_counters_as_they_were() -> None:
    module = Counters().eval()
    moec.compile(module, (X,), verify=False, build=False)
    assert (module.count, module.history, module.last) == (0, [], None)


class First(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.warm:
            self.warm = True
            return self.linear(x) * 0
        return self.linear(x)


def test_a_first_call_that_computes_something_else_is_refused() -> None:
    module = First().eval()
    with pytest.raises(CaptureError, match=r"first call .* second: it sets self.warm\n") as refusal:
        earlier_calls(module, (X,), {})
    _, line, remedy = str(refusal.value).split("\n")
    assert line.endswith("`if not self.warm:` reads it")
    assert remedy == "  call the module once before it is compiled"
    module(X)
    assert not earlier_calls(module, (X,), {}).slots


class Filled(Keeping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "positions"):
            self.positions = torch.ones(4)
        return self.linear(x) + self.positions


def test_a_value_that_the_first_call_keeps_is_no_state() -> None:
    module = Filled().eval()
    assert not earlier_calls(module, (X,), {}).slots
    assert not hasattr(module, "positions")


class Sinusoidal(Keeping):
    """Fills a table in place, at its first call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.last is None:
            table, angles = torch.zeros(9, 4), torch.arange(9.0)[:, None]
            table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
            self.last = table
            self.scale = torch.tensor([1.0, 2.0]).mul_(3)
        return self.linear(x) + self.last[: x.shape[0]] * self.scale[0]


class InPlace(Keeping):
    """Adds to what it keeps, without a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.add_(1)
        return self.linear(x)


def test_a_table_that_the_first_call_fills_in_place_is_what_it_filled() -> None:
    assert not earlier_calls(Sinusoidal().eval(), (X,), {}).slots
    module = InPlace().eval()
    earlier_calls(module, (X,), {})
    assert not module.mean.any()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.LazyLinear(4), nn.LazyBatchNorm1d()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.linear(x))
        return result


def test_a_lazy_module_gets_its_parameters_as_at_a_first_call() -> None:
    torch.manual_seed(0)
    expected = Lazy().eval()
    result = expected(X)
    torch.manual_seed(0)
    module = Lazy().eval()
    assert not earlier_calls(module, (X,), {}).slots
    torch.testing.assert_close(module(X), result)
    assert module.linear.in_features == 4


class Inventive:
    """Has every attribute that is read."""

    def __getattribute__(self, name: str) -> Any:
        return lambda *arguments: name


class HoldsInventive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.handle = nn.Linear(4, 4), Inventive()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


def test_an_object_may_invent_its_attributes() -> None:
    assert not earlier_calls(HoldsInventive(), (X,), {}).slots


def test_a_description_does_not_hide_a_count_of_calls() -> None:
    with pytest.raises(CaptureError, match=r"depends on self\.count"):
        moec.compile(
            Count(), (X,), descriptions=[Declared(Count, lambda module, x: x)], build=False
        )
