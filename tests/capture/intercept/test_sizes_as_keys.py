"""Sizes as arguments of cached functions, and as keys of dicts and sets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate


@lru_cache(maxsize=2)
def positions(length: int, *, start: int = 0) -> Tensor:
    return torch.arange(start, start + length).float()


@cache
def fibonacci(number: int) -> int:
    return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)


class Layer(nn.Module):
    def __init__(self, scale: Callable[[Layer, int], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = scale

    @lru_cache  # noqa: B019
    def mask(self, length: int, most: int) -> Tensor:
        return (torch.arange(length) < most).float()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.scale(self, x.shape[1])[None, :, None]
        return y


def cached(layer: Layer, length: int) -> Tensor:
    capacity = max(1, length // 2)
    shifted = positions(length, start=capacity) + positions(length)
    return shifted * layer.mask(length, capacity) + fibonacci(40) % 7


def test_a_cached_function_of_a_size_is_a_function_of_the_size() -> None:
    module = Layer(cached).eval()
    module(torch.randn(2, 6, 4))  # its caches have the length of the example
    captured = capture(module, (torch.randn(2, 6, 4),))
    for length in (1, 2, 6, 7, 13):
        x = torch.randn(3, length, 4)
        (actual,) = evaluate(captured.program.graph, [x], captured.program.weights)
        with torch.no_grad():
            torch.testing.assert_close(actual, module(x))


TABLE = {4: 1.0, 6: 2.0}


def entry(layer: Layer, length: int) -> Tensor:
    return torch.ones(length) * TABLE.get(length, 3.0)


def member(layer: Layer, length: int) -> Tensor:
    return torch.ones(length) * (2.0 if length in {4, 6} else 1.0)


@pytest.mark.parametrize(
    ("scale", "line"),
    [
        (entry, "return torch.ones(length) * TABLE.get(length, 3.0)"),
        (member, "`return torch.ones(length) * (2.0 if length in {4, 6} else 1.0)`"),
    ],
)
def test_a_size_as_a_key_is_refused_with_its_line(
    scale: Callable[[Layer, int], Tensor], line: str
) -> None:
    with pytest.raises(CaptureError, match="a size that varies is a key of a dict") as refusal:
        capture(Layer(scale).eval(), (torch.randn(2, 6, 4),))
    assert line in str(refusal.value)
