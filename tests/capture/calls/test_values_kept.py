"""Modules that keep tables which their forward computes: a trace leaves none in the module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.capture import capture
from moec.ir.interpret.evaluate import evaluate


class Absent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table") or len(self.table) < len(x):
            self.table = torch.arange(2 * len(x))[:, None] * 0.5
        return x + self.table[: len(x)]


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.shape[0] < x.shape[0]:
            self.table = torch.arange(x.shape[0])[:, None] * 0.5
        return x * self.table[: x.shape[0]]


class Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < len(x):
            self.table = torch.tril(torch.ones(len(x), len(x)))
        return self.table[: len(x), : len(x)] @ x


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, Tensor] = {}
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if "rows" not in self.tables or len(self.tables["rows"]) < len(x):
            self.tables["rows"] = torch.arange(len(x))[:, None] + 1
        self.history.append(x)
        return x / self.tables["rows"][: len(x)]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Absent(), Growing()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x


@pytest.mark.parametrize("kind", [Absent, Growing, Buffer, Held, Part])
def test_a_table_is_computed_at_every_length_and_not_left(kind: type[nn.Module]) -> None:
    module = kind().eval()
    captured = capture(module, (torch.randn(5, 4),))
    assert not any(type(tensor) is not Tensor for tensor in _tensors(module))
    graph = captured.program.graph
    for length in (1, 5, 9, 300):
        x = torch.randn(length, 4)
        (actual,) = evaluate(graph, [x], captured.program.weights)
        torch.testing.assert_close(actual, kind()(x))
        torch.testing.assert_close(module(x), kind()(x))


def _tensors(module: nn.Module) -> list[Tensor]:
    values = [value for part in module.modules() for value in vars(part).values()]
    values += [v for value in values if isinstance(value, dict) for v in value.values()]
    values += [v for value in values if isinstance(value, list) for v in value]
    return [value for value in values if isinstance(value, Tensor)]


class Fixed(nn.Module):
    """The first call's length decides what later calls compute."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = 1 / len(x)
        return x * self.scale


def test_a_number_of_the_first_call_is_no_wrong_number() -> None:
    module = Fixed().eval()
    module(torch.randn(5, 4))
    compiled = moec.compile(module, (torch.randn(5, 4),), build=False)
    (actual,) = evaluate(compiled.captured.program.graph, [torch.ones(7, 4)], {})
    torch.testing.assert_close(actual, torch.full((7, 4), 0.2))


class Hooked(nn.Module):
    """The first call adds a hook, which doubles: `before` the inner module runs, or after."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.before = before
        self.done: dict[str, bool] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            if self.before:
                self.inner.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            else:
                self.inner.register_forward_hook(lambda module, args, y: y * 2)
            self.done["hooks"] = True
        return self.inner(x) + 1


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_a_first_call_are_added_once(before: bool) -> None:
    module = Hooked(before).eval()
    compiled = moec.compile(module, (torch.randn(5, 4),), build=False)
    x = torch.randn(7, 4)
    (actual,) = evaluate(compiled.captured.program.graph, [x], {})
    torch.testing.assert_close(actual, x * 2 + 1)
    torch.testing.assert_close(module(x), x * 2 + 1)
