"""Floats of sizes and of data as operands, and sizes that code asks for their type."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate

SIZES = (1, 6, 9, 33)


def check(module: nn.Module, rtol: float = 0) -> None:
    """The module's graph equals eager, by default to the last bit of each result, at every size."""
    torch.manual_seed(0)
    compiled = moec.compile(module.eval(), (torch.randn(6, 8),), build=False)
    program = compiled.pass_results[-1].program
    assert [limits.low for limits in program.graph.bounds.values()] in ([0], [1])
    for size in SIZES:
        x = torch.randn(size, 8)
        results = evaluate(program.graph, [x], program.weights)
        for result, expected in zip(results, module(x), strict=True):
            assert result.dtype == expected.dtype
            torch.testing.assert_close(result, expected, rtol=rtol, atol=rtol)


class Operands(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        return (
            x * (n / 4) + 1 / n,
            n / 3 - x / (1.0 / n),
            (n / 3) / (x.abs() + 1),
            (x * 3).long() * (n / 7),
            x.bfloat16() * (n / 3),
            x * n**-0.5 - float(n),
            x / (n / 2) ** 0.5,
            x * (x.max().item() / n),
            x.sum() * (n / 4),
            x.sum().long() * (n / 4),
        )


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        return (
            x.clamp(-n / 40, 0.5),
            (x * 9).long().clamp(max=n / 4),
            x.masked_fill(x > n / 40, n / 5),
            torch.where(x > 0, n / 5, 0.1),
            torch.full((2,), n / 5),
            torch.full_like(x, n / 4),
            x * torch.tensor(n / 4),
            x.abs() ** (n / 4),
            torch.remainder(x, n / 9),
        )


class Conditions(nn.Module):
    """Comparisons of sizes as operands."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        return (
            x * (n > 6),
            x + (n / 3 >= 3),
            (x * 9).long() * (n != 9),
            x.sum() * (n == 1),
            torch.full_like(x, n <= 9),
        )


class Roots(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        return (
            x / math.sqrt(n),
            x * max(1.0, math.sqrt(n) / 2),
            x * math.pow(n, -0.25),
            x.sum() * (math.sqrt(16) + math.sqrt(n + 2)),
        )


class ComparedIntegers(nn.Module):
    """Integers that are compared with floats of sizes, in float32 as PyTorch compares them."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        position = torch.arange(n)
        return (position < n / 3, position >= n * 0.25 + 1, (position == n // 2.0) * 1.0)


class Sinkhorn(nn.Module):
    """Scores normalised over tokens and experts in turn, as Megatron writes it."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        cost = torch.exp(x)
        tokens, experts = cost.shape
        for _ in range(3):
            cost = cost * ((1 / tokens) * 1 / (cost.sum(1, keepdim=True) + 1e-8))
            cost = cost * ((1 / experts) * 1 / (cost.sum(0, keepdim=True) + 1e-8))
        return cost, cost.sum() * (experts / tokens)


class Extremes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        capacity = int(max(n / 8 * 1.25, 4.0))
        return (
            x * min(1.0, n / 8),
            x.sum() * (5 / max(n / 2, 1.0)),
            x * min(n / 8, 0.5, 2.0) * max([n * 0.1, 1.0]),
            x * (torch.arange(n) < capacity)[:, None],
            x * float(max(min(n, 16), 3)),
        )


class Asking(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n, half = x.shape[0], x.shape[0] / 2
        return (
            x + 1 if isinstance(n, int) else x,
            x + 1 if isinstance(half, float | str) else x,
            x + 1 if type(n) is int and type(half) is float else x,
            x * (torch.arange(n) < divmod(n, 4)[0])[:, None] + divmod(n, 4)[1],
            x + 1 if isinstance(type(n), type) and type("", (), {}) is not str else x,
        )


class Converted(nn.Module):
    """int() is replaced as well, in the second export of a line that converts a size."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        half = int(x.shape[0] / 2)
        return (
            x * (torch.arange(x.shape[0]) < half)[:, None],
            x + 1 if isinstance(half, (float, bool)) else x,
            x + 1 if type(half) is int else x,
        )


@pytest.mark.parametrize(
    "module",
    [
        Operands(),
        Numbers(),
        Conditions(),
        Roots(),
        ComparedIntegers(),
        Sinkhorn(),
        Extremes(),
        Asking(),
        Converted(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_graph_equals_eager(module: nn.Module) -> None:
    check(module)


class Factor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, x.abs(), alpha=x.shape[0] / 6)


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.elu(x, alpha=x.shape[0] / 9)


class Digits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(round(x.shape[0] / 7, 1))]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Factor, r"alpha=x.shape\[0\] / 6\)`: the number IntTrueDiv\(T, 6\) depends on a size"),
        (Activation, r"alpha=x.shape\[0\] / 9\)`: the number IntTrueDiv\(T, 9\) depends on a size"),
        (Digits, r"RoundDecimal\(IntTrueDiv\(T, 7\), 1\)\) is made of floats"),
    ],
)
def test_numbers_of_sizes_that_no_graph_has(kind: type[nn.Module], words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        moec.compile(kind().eval(), (torch.randn(7, 8),), build=False)


class Literal(nn.Module):
    """A branch on a literal that a float of sizes multiplies; torch would take it as in the example
    and record nothing."""

    def forward(self, x: Tensor) -> Tensor:
        limit = torch.tensor(2.0) * (x.shape[0] / 6)
        return x * (3 if limit > 2 else 1)


class WrittenLiteral(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        limit = torch.tensor(2.0)
        limit.mul_(x.shape[0] / 6)
        return x * (3 if limit > 2 else 1)


@pytest.mark.parametrize("kind", [Literal, WrittenLiteral])
def test_a_branch_on_a_literal_times_a_float_of_sizes_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(CaptureError, match=r"if limit > 2 else 1\)` was taken to be True"):
        moec.compile(kind().eval(), (torch.randn(7, 8),), build=False)
