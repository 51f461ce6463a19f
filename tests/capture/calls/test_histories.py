"""Calls that change the results of later calls are refused, with the line that decides."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.capture.earlier_calls.other_inputs import counts_with_inputs
from moec.capture.earlier_calls.two_runs import earlier_calls
from moec.errors import CaptureError

X = torch.randn(3, 4)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.longest = 0
        self.scale: Any = None
        self.table: dict[str, int] = {}
        self.calls = [0, 0]


class FirstData(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.abs().mean()
        return self.linear(x) / self.scale


class FirstLength(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.table.setdefault("rows", x.shape[0])


class Longest(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.longest:
            self.longest = x.shape[0]
        return self.linear(x) / self.longest


class WrittenInPlace(Linear):
    """Its result is a tensor that is written after it was created."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out += self.linear(x) * self.table.setdefault("rows", x.shape[0])
        return out


class Grows(Linear):
    """Keeps a table, and its length, for the longest input."""

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None or x.shape[0] > self.longest:
            self.longest = max(x.shape[0], 5)
            self.scale = torch.arange(self.longest)[:, None]
        return self.linear(x) + self.scale[: x.shape[0]]


def test_the_length_of_a_table_is_no_count() -> None:
    module = Grows().eval()
    module(X)
    inputs = [[torch.randn(rows, 4)] for rows in (9, 3, 1)]
    assert not counts_with_inputs(module, lambda x: [module(x)], inputs)
    assert module.longest == 5


class Lengths(Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.table[str(x.shape[0])] = 1
        return self.linear(x) / len(self.table)


DEPENDENT = {
    FirstData: ("self.scale", "if self.scale is None:"),
    FirstLength: ("self.table", 'self.table.setdefault("rows", x.shape[0])'),
    Longest: ("self.longest", "if x.shape[0] > self.longest:"),
    WrittenInPlace: ("self.table", 'self.table.setdefault("rows", x.shape[0])'),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_a_value_of_an_earlier_call_that_later_calls_read_is_refused(kind: Any) -> None:
    slot, code = DEPENDENT[kind]
    module = kind().eval()
    with pytest.raises(CaptureError) as refusal:
        moec.compile(module, (X,), verify=False, build=False)
    first, line, sizes, remedy = str(refusal.value).split("\n")
    assert f"its result depends on what an earlier call left in {slot}" in first
    assert "test_histories.py:" in line
    assert code in line
    assert sizes == "  a call with inputs of (9, 4) changes the result for inputs of (3, 4)"
    assert "fill it before the model is compiled" in remedy
    assert (module.longest, module.scale, module.table) == (0, None, {})
    module(X)
    if kind is not Longest:
        moec.compile(module, (X,), verify=False, build=False)


class Idle(Linear):
    """Counts in a branch that the example does not take."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        for expert in range(2):
            rows = torch.where(x[:, 0] * (1 - 2 * expert) > 1e9)[0]
            if rows.numel() > 0:
                self.calls[expert] += 1
                y = y.index_add(0, rows, self.of(rows, y, expert))
        return y

    def of(self, rows: Tensor, y: Tensor, expert: int) -> Tensor:
        return y[rows] * self.calls[expert]


class IdleCount(Idle):
    def of(self, rows: Tensor, y: Tensor, expert: int) -> Tensor:
        return y[rows]


def test_a_count_that_a_branch_which_the_example_does_not_take_reads_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"self\.calls.*, which changes") as refusal:
        moec.compile(Idle().eval(), (X,), verify=False, build=False)
    assert "`return y[rows] * self.calls[expert]` reads it" in str(refusal.value)
    moec.compile(IdleCount().eval(), (X,), verify=False, build=False)


class HasAttribute(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if hasattr(self, "cache"):
            y = y + 1
        self.cache = 1
        return y


class Caught(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        try:
            return y + self.cache
        except AttributeError:
            self.cache = 1
        return y


class Contained(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if "k" in self.table:
            y = y + 1
        self.table["k"] = 1
        return y


EXISTENCE = {
    HasAttribute: 'if hasattr(self, "cache"):',
    Caught: "return y + self.cache",
    Contained: 'if "k" in self.table:',
}


@pytest.mark.parametrize("kind", EXISTENCE)
def test_the_line_at_which_the_first_call_goes_another_way_is_named(kind: Any) -> None:
    with pytest.raises(CaptureError, match="first call computes something else") as refusal:
        earlier_calls(kind().eval(), (X,), {})
    assert f"`{EXISTENCE[kind]}` reads it" in str(refusal.value)


class NewParameter(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "weight"):
            self.weight = nn.Parameter(torch.randn(4))
        return self.linear(x) * self.weight


class NewModule(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "second"):
            self.second = nn.Linear(4, 4)
        return self.second(self.linear(x))


@pytest.mark.parametrize(("kind", "part"), [(NewParameter, "weight"), (NewModule, "second")])
def test_a_part_that_the_first_call_creates_is_refused_and_removed(kind: Any, part: str) -> None:
    module = kind().eval()
    with pytest.raises(CaptureError, match=rf"its first call creates self\.{part}, .*\n.* once "):
        earlier_calls(module, (X,), {})
    assert not hasattr(module, part)
    module(X)
    earlier_calls(module, (X,), {})


@dataclasses.dataclass
class Config:
    calls: int = 0


class Table(dict[str, int]):
    """A class of the user's that is a container."""


class Holders(Linear):
    """Holds one count where code can hide it."""

    def __init__(self, holder: str) -> None:
        super().__init__()
        hidden = nn.Identity()
        hidden.config = Config()
        self.holders = {
            "object": Config(),
            "tuple": ([Config()],),
            "module": [hidden],
            "partial": functools.partial(len, [Config()]),
            "container": Table(calls=0),
        }
        self.holder = self.holders[holder]

    def forward(self, x: Tensor) -> Tensor:
        held: Any = self.holder
        if isinstance(held, Table):
            held["calls"] += 1
            return self.linear(x) * held["calls"]
        if isinstance(held, functools.partial):
            held = held.args[0][0]
        elif isinstance(held, tuple):
            held = held[0][0]
        elif isinstance(held, list):
            held = held[0].config
        held.calls += 1
        return self.linear(x) * held.calls


@pytest.mark.parametrize("holder", "object tuple module container".split())
def test_a_count_is_found_where_code_holds_it(holder: str) -> None:
    module = Holders(holder).eval()
    with pytest.raises(CaptureError, match="which changes from call to call"):
        earlier_calls(module, (X,), {})
    assert module.holders["object"].calls == module.holders["container"]["calls"] == 0


def test_a_count_that_no_snapshot_finds_is_refused_without_its_name() -> None:
    with pytest.raises(CaptureError, match="two calls with the same inputs give different results"):
        earlier_calls(Holders("partial").eval(), (X,), {})


class Losses(Linear):
    """Keeps what a training loop reads after the call."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.aux_loss = y.square().mean()
        self.calls = (self.calls + [x.shape[0]])[-5:]  # noqa: RUF005
        return y


def test_the_report_says_that_the_compiled_model_sets_no_attributes() -> None:
    module = Losses().eval()
    compiled = moec.compile(module, (X,), verify=False, build=False)
    note = (
        "calls of the compiled model do not set self.calls, self.aux_loss; "
        "capture ran the module, and put them back"
    )
    assert note in compiled.report().notes
    assert not hasattr(module, "aux_loss")


class Warm(Linear):
    """Reads its step in training only."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            self.longest += 1
            y = y * self.longest
        return y


def test_a_module_in_training_is_captured_as_in_eval() -> None:
    moec.compile(Warm(), (X,), verify=False, build=False)


class Plain(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Tabled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None or len(self.scale) < len(x):
            self.scale = torch.arange(len(x))[:, None]
        return self.linear(x) + self.scale[: len(x)]


def run_rows(module: nn.Module) -> list[int]:
    rows: list[int] = []

    def keep(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if part is module and type(inputs[0]) is Tensor:
            rows.append(len(inputs[0]))

    hook = nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        moec.compile(module, (X,), verify=False, build=False)
    finally:
        hook.remove()
    return rows


def test_a_module_without_values_of_calls_is_run_on_no_other_sizes() -> None:
    """Runs with fewer rows, and draws, are those of the capture, which compares such sizes."""
    rows = run_rows(Plain().eval())
    assert rows.count(3) == 2 + 3
    assert max(rows) == 3
    assert 9 in run_rows(Tabled().eval())
