"""What Python computes of sizes is what the graph has at every length, or is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import moec
from moec.capture import capture
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate
from tests.capture.modules import Function
from tests.capture.sized import REFUSED, RIGHT, first

x = torch.randn(24, 8)
SIZES = (1, 2, 3, 7, 8, 9, 23, 24, 25, 27, 28, 31, 32, 33, 40, 55, 80, 100, 120, 240, 320, 400, 401)


def at(function: Any, *tensors: torch.Tensor) -> None:
    """Compare the captured graph with the function; whole numbers of rows are exact."""
    captured = function
    (actual,) = evaluate(captured.program.graph, tensors, captured.program.weights)
    (expected,) = captured.eager(*tensors)
    assert torch.equal(actual, expected), tensors[0].shape


@pytest.mark.parametrize("name", RIGHT)
def test_a_size_that_python_computed_is_what_python_computes(name: str) -> None:
    captured = capture(Function(RIGHT[name]), (x,))
    for size in SIZES:
        at(captured, torch.randn(size, 8))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_elsewhere_is_refused(name: str) -> None:
    function, words = REFUSED[name]
    with pytest.raises(CaptureError, match=words) as caught:
        capture(Function(function), (x,))
    message = str(caught.value)
    assert len(message.splitlines()) <= 6
    assert re.search(r"\w+\.py:\d+", message) or "cannot be exported" in message


class Tied(nn.Module):
    """A capacity that Python computes beside a top-k, whose ties are no excuse."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        keep = (torch.arange(n) < min(n, int(n * 2.0 / 8))).float()
        best = x.topk(2, dim=-1)[0].sum(-1, keepdim=True)
        return self.linear(x) * keep[None, :, None] + best


def test_a_capacity_beside_a_top_k_is_right_at_every_length() -> None:
    module = Tied().eval()
    compiled = moec.compile(module, (torch.randn(2, 24, 16),))
    for length in (1, 3, 4, 24, 27, 28, 40):
        x = torch.randn(2, length, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))


def test_compiled_code_rounds_as_python_does() -> None:
    """In kernels, where `first` compares, and in shapes, of which `slots` makes one."""

    def both(x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        remaining = first(x, -int(-(count / 8 * 1.1) // 1))
        return remaining + x.new_ones(round(count * 0.57 * 100 - 0.5), 8).sum(0)

    compiled = moec.compile(Function(both), (x,))
    for size in (7, 24, 80, 100, 160, 240, 320, 400):
        tokens = torch.randn(size, 8)
        assert torch.equal(compiled(tokens), both(tokens)), size


def test_onnx_rounds_as_python_does(tmp_path: Path) -> None:
    import onnxruntime

    function = RIGHT["ceil(2*n*1.2/8)"]
    path = tmp_path / "model.onnx"
    moec.compile(Function(function), (x,), build=False).export_onnx(path)
    session = onnxruntime.InferenceSession(str(path))
    for size in (1, 24, 80, 160, 400):
        tokens = torch.randn(size, 8)
        (actual,) = session.run(None, {"x": tokens.numpy()})
        assert torch.equal(torch.from_numpy(actual), function(tokens)), size


class Capacity(nn.Module):
    """Two of four linear experts, each for so many rows as 1.1 times its share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(16, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 16, 32) * 0.2)
        self.down = nn.Parameter(torch.randn(4, 32, 16) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        capacity = max(int(x.shape[0] * 1.1 / 4), 2)
        weight, expert = self.gate(x).softmax(-1).max(-1)
        mask = functional.one_hot(expert, 4)
        position = (mask.cumsum(0) - 1) * mask
        mask = mask * (position < capacity)
        slot = functional.one_hot((position * mask).sum(-1), capacity).float()
        share = (weight[:, None] * mask).sum(-1)
        combine = share[:, None, None] * mask[:, :, None].float() * slot[:, None, :]
        rows = torch.einsum("tec,td->ecd", combine.bool().float(), x)
        return torch.einsum("tec,ecd->td", combine, (rows @ self.up).relu() @ self.down)


def test_a_capacity_of_floats_is_recognised_and_right_through_every_door() -> None:
    module = Capacity().eval()
    compiled = moec.compile(module, (torch.randn(24, 16),))
    assert len(compiled.blocks) == 1
    backend = torch.compile(module, backend="moec", dynamic=True, options={"rest": "eager"})
    with torch.no_grad():
        for size in (1, 8, 24, 40, 80, 200, 400):
            x = torch.randn(size, 16)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
        for size in (24, 40, 80):
            x = torch.randn(size, 16)
            torch.testing.assert_close(backend(x), module(x), rtol=1e-4, atol=1e-5)


def test_int_and_float_are_still_types_while_sizes_are_kept() -> None:
    def typed(x: torch.Tensor) -> torch.Tensor:
        remaining = int(len(x) * 0.5)
        plain = isinstance(3, int) and not isinstance(3.0, int) and int("7") == 7
        return first(x, remaining) if plain else x

    captured = capture(Function(typed), (x,))
    for size in (5, 24, 40):
        at(captured, torch.randn(size, 8))


def test_a_module_that_needs_the_real_int_is_refused_with_its_line() -> None:
    def typed(x: torch.Tensor) -> torch.Tensor:
        return first(x, int(x.shape[0] * 0.5)) + torch.zeros(8, dtype=int)

    with pytest.raises(
        CaptureError, match=r"test_python_numbers.py:\d+ in typed(.|\n)*floor\(T/2\) == 12"
    ):
        capture(Function(typed), (x,))
