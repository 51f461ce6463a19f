"""Where Python's arithmetic on sizes is defined, and sizes of 0: eager or a refusal."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moec
from moec.capture import capture
from moec.errors import InputError, IRError
from moec.ir.interpret.evaluate import evaluate
from moec.ir.sizes.dims import Bounds
from tests.capture.modules import Function

WIDTH = 4
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17)


def mean_of(x: Tensor, count: float) -> Tensor:
    """A result that is not empty, whatever the size of x."""
    return x.sum(0) + torch.ones(WIDTH) * count


FAILING: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "n // int(n**0.5)": (lambda x: mean_of(x, len(x) // int(len(x) ** 0.5)), 1),
    "100 // n": (lambda x: mean_of(x, 100 // len(x)), 1),
    "100 / n": (lambda x: mean_of(x, 100 / x.shape[0]), 1),
    "100 % n": (lambda x: mean_of(x, 100 % len(x)), 1),
    "divmod(100, n)": (lambda x: mean_of(x, sum(divmod(100, len(x)))), 1),
    "n**-0.5": (lambda x: mean_of(x, len(x) ** -0.5), 1),
    "n**-1": (lambda x: mean_of(x, len(x) ** -1), 1),
    "1 / sqrt(n)": (lambda x: mean_of(x, 1 / math.sqrt(len(x))), 1),
    "n // (n // 4)": (lambda x: mean_of(x, len(x) // (len(x) // 4)), 4),
    "n % (n // 3)": (lambda x: mean_of(x, len(x) % (len(x) // 3)), 3),
    "8 / int(n * 0.3)": (lambda x: mean_of(x, 8 / int(len(x) * 0.3)), 4),
    "an empty result": (lambda x: x * (1 / len(x)), 1),
}


@pytest.mark.parametrize("name", FAILING)
def test_where_python_fails_the_size_is_refused(name: str) -> None:
    function, least = FAILING[name]
    captured = capture(Function(function), (torch.randn(8, WIDTH),))
    bounds = captured.program.graph.bounds["T"]
    assert bounds == Bounds(least)
    assert "test_domains.py:" in bounds.line
    graph, weights = captured.program.graph, captured.program.weights
    for size in SIZES:
        x = torch.randn(size, WIDTH)
        try:
            (expected,) = captured.eager(x)
        except (ZeroDivisionError, ValueError):
            with pytest.raises(IRError, match=r"T is outside of .*test_domains.py:"):
                evaluate(graph, [x], weights)
        else:
            torch.testing.assert_close(evaluate(graph, [x], weights)[0], expected)


def test_the_refusal_has_the_line_of_the_quotient() -> None:
    compiled = moec.compile(
        Function(lambda x: mean_of(x, len(x) // (len(x) // 4))), (torch.randn(8, WIDTH),)
    )
    with pytest.raises(InputError, match=r"T at least 4 \(test_domains.py:\d+ .*len\(x\) // 4"):
        compiled(torch.randn(3, WIDTH))


def test_a_product_of_sizes_that_is_a_divisor() -> None:
    def average(x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        return x.sum((0, 1)) + 1 / (batch * length)

    bounds = capture(Function(average), (torch.randn(3, 5, WIDTH),)).program.graph.bounds
    assert bounds == {"B": Bounds(1), "S": Bounds(1)}


def test_a_quotient_of_a_product_limits_the_product() -> None:
    def share(x: Tensor) -> Tensor:
        tokens = x.shape[0] * x.shape[1]
        return x.sum((0, 1)) + tokens // (tokens // 4)

    captured = capture(Function(share), (torch.randn(3, 5, WIDTH),))
    graph, weights = captured.program.graph, captured.program.weights
    for batch, length in ((1, 4), (2, 2), (3, 5), (7, 1)):
        x = torch.randn(batch, length, WIDTH)
        torch.testing.assert_close(evaluate(graph, [x], weights)[0], share(x))
    for batch, length in ((1, 3), (3, 1), (1, 1)):
        with pytest.raises(IRError, match=r"test_domains\.py"):
            evaluate(graph, [torch.randn(batch, length, WIDTH)], weights)


def mean_of_some(x: Tensor) -> Tensor:
    quarter = len(x) // 4
    tokens = 100 // quarter
    if quarter > 4:
        quarter = 4
    return mean_of(x[:quarter], tokens)


def mean_of_all(x: Tensor) -> Tensor:
    """The divisor is a quarter, which is 0 below 4 rows, or a number."""
    quarter = len(x) // 4
    if quarter > 4:
        quarter = 4
    return mean_of(x, len(x) // quarter)


@pytest.mark.parametrize("share", [mean_of_some, mean_of_all])
def test_a_divisor_limits_the_sides_of_a_branch(share: Callable[[Tensor], Tensor]) -> None:
    captured = capture(Function(share), (torch.randn(24, WIDTH),))
    graph, weights = captured.program.graph, captured.program.weights
    assert graph.bounds == {"T": Bounds(4)}
    for size in (4, 5, 15, 16, 19, 20, 21, 40):
        x = torch.randn(size, WIDTH)
        torch.testing.assert_close(evaluate(graph, [x], weights)[0], share(x))


def test_a_divisor_that_is_not_zero_has_no_bound() -> None:
    for function in (lambda x: mean_of(x, 100 // (len(x) + 1)), lambda x: x.sum(0) / 3):
        captured = capture(Function(function), (torch.randn(8, WIDTH),))
        assert captured.program.graph.bounds == {"T": Bounds(0)}
        (actual,) = evaluate(captured.program.graph, [torch.randn(0, WIDTH)], {})
        assert torch.equal(actual, function(torch.randn(0, WIDTH)))


def test_a_quotient_of_tensors_has_no_bound() -> None:
    """0 / 0 of tensors is NaN, in eager too."""
    captured = capture(Function(lambda x: x.sum(0) / x.shape[0]), (torch.randn(8, WIDTH),))
    (actual,) = evaluate(captured.program.graph, [torch.randn(0, WIDTH)], {})
    assert actual.isnan().all()


def branch(x: Tensor) -> Tensor:
    return mean_of(x, 2 if len(x) else 1)


def at_least_one(x: Tensor) -> Tensor:
    return mean_of(x, 6 // max(len(x), 1))


def raises(x: Tensor) -> Tensor:
    if not len(x):
        raise ValueError("no tokens")
    return x + 1


@pytest.mark.parametrize("function", [branch, at_least_one, raises])
def test_another_result_at_zero_is_refused_there(function: Callable[[Tensor], Tensor]) -> None:
    captured = capture(Function(function), (torch.randn(8, WIDTH),))
    assert captured.program.graph.bounds == {"T": Bounds(1)}


def test_the_same_result_at_zero_is_no_bound() -> None:
    captured = capture(Function(lambda x: x * (6 / max(len(x), 1))), (torch.randn(8, WIDTH),))
    assert captured.program.graph.bounds == {"T": Bounds(0)}
