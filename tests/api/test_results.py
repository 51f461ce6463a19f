"""A compiled model returns the same structure as its module; an artifact returns tensors by
name."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

import moec
from moec.capture.capture import capture
from moec.errors import CaptureError


@dataclass
class Routed(ModelOutput):
    logits: torch.Tensor | None = None
    states: Any = None


@dataclass(frozen=True, slots=True)
class Loss:
    value: torch.Tensor
    dropped: int


class Pair(NamedTuple):
    low: torch.Tensor
    high: Any


class Nested(nn.Module):
    """All kinds at once, in both a plain forward and one that reads its data."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(8, 8), reads

    def forward(self, x: torch.Tensor) -> OrderedDict[str, Any]:
        y = self.linear(x)
        if self.reads and (y > 1).any():
            y = torch.where(y > 1, 2 * y - 1, y)
        routed = Routed(logits=y, states=(y + 1, None))
        pair = Pair(y.amin(-1), [None, "text", {"loss": Loss(y.mean(), 3)}])
        return OrderedDict(second=routed, first=pair, scale=0.5)


@pytest.fixture(scope="module", params=["traced", "speculated"])
def nested(request: pytest.FixtureRequest) -> moec.CompiledModel:
    torch.manual_seed(0)
    module = Nested(request.param == "speculated").eval()
    return moec.compile(module, (torch.randn(2, 3, 8),), verify=False)


def test_as_the_module_returns_it(nested: moec.CompiledModel) -> None:
    x = torch.randn(3, 5, 8)
    result, expected = nested(x), nested.source.model(x)
    assert list(result) == ["second", "first", "scale"]
    assert type(result) is OrderedDict
    assert type(result["second"]) is Routed
    assert type(result["first"]) is Pair
    assert result["second"].states[1] is None
    loss = result["first"].high[2]["loss"]
    assert type(loss) is Loss
    assert loss.dropped == 3
    pairs = (
        (result["second"].logits, expected["second"].logits),
        (result["second"].states[0], expected["second"].states[0]),
        (result["first"].low, expected["first"].low),
        (loss.value, expected["first"].high[2]["loss"].value),
    )
    for actual, right in pairs:
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)


def test_constants_are_said(nested: moec.CompiledModel) -> None:
    notes = nested.report().notes
    for line in (
        "scale is always 0.5",
        "first.high.1 is always 'text'",
        "first.high.2.loss.dropped is always 3",
    ):
        assert line in notes


def test_numpy_in_numpy_out(nested: moec.CompiledModel) -> None:
    result = nested(np.ones((1, 2, 8), np.float32))
    assert isinstance(result["second"].logits, np.ndarray)


def test_an_artifact_gives_tensors_by_name(nested: moec.CompiledModel, tmp_path: Path) -> None:
    nested.save(tmp_path / "nested.moec")
    x = np.ones((1, 2, 8), np.float32)
    result, expected = moec.load(tmp_path / "nested.moec")(x), nested(x)
    assert list(result) == ["second_0", "second_1", "first_0", "first_1"]
    np.testing.assert_array_equal(result["second_0"], expected["second"].logits)
    np.testing.assert_array_equal(result["first_1"], expected["first"].high[2]["loss"].value)


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> Any:
        return self.what(x)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (lambda x: {"n": x.shape[0] / 3, "x": x}, "output n is a Python number that may vary"),
        (lambda x: (x, (x > 0).any().item()), "output 1 is a Python number that may vary"),
        (lambda x: [x, {x}], "output 1 is a set, which may not contain tensors of a result"),
        (lambda x: [x, torch.distributions.Normal(x, 1.0)], "output 1 is a Normal, which may not"),
    ],
)
def test_what_has_no_constant_is_refused(what: Any, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        capture(Returns(what), (torch.randn(2, 3, 8),))


class Numbers(nn.Module):
    """Switch routing with a capacity, as labml writes it: counts, and how many tokens were dropped,
    are returned as Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        scores, ids = self.gate(x).softmax(-1).max(-1)
        lists = [torch.eq(ids, number).nonzero(as_tuple=True)[0] for number in range(3)]
        y, counts, dropped = torch.zeros_like(x), [len(rows) for rows in lists], []
        capacity = int(1.25 * len(x) / 3)
        for number, rows in enumerate(lists):
            if len(rows) <= capacity:
                continue
            dropped.append(rows[capacity:])
            lists[number] = rows[:capacity]
        for rows, expert in zip(lists, self.experts, strict=True):
            y[rows] = expert(x[rows])
        if dropped:
            dropped = torch.cat(dropped)
            y[dropped] = x[dropped]
        numbers = {"dropped": len(dropped), "rows": 2 * x.shape[0], "score": scores.sum().item()}
        return y * scores[:, None], counts, numbers


def test_numbers_come_back_as_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Numbers().eval()
    compiled = moec.compile(module, (torch.randn(6, 8),), verify=False)
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(3, 1)]
    for x in (torch.randn(1, 8), torch.randn(40, 8), torch.ones(9, 8)):
        (y, counts, numbers), (right, expected, others) = compiled(x), module(x)
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
        assert counts == expected
        assert all(type(count) is int for count in counts)
        assert numbers == pytest.approx(others, rel=1e-6)
        assert list(map(type, numbers.values())) == [int, int, float]
    compiled.save(tmp_path / "numbers.moec")
    loaded = moec.load(tmp_path / "numbers.moec")(np.ones((9, 8), np.float32))
    assert int(loaded["output_4"]) == others["dropped"]


class Busy(nn.Module):
    """Experts without rows are skipped, and how many are not is returned as a number, or as so many
    tensors."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.gate, self.listed = nn.Linear(8, 3), listed
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        ids, y, busy = self.gate(x).argmax(-1), torch.zeros_like(x), []
        for number, expert in enumerate(self.experts):
            mask = ids == number
            if not mask.any():
                continue
            y[mask] = expert(x[mask])
            busy.append(mask)
        return (y, *busy) if self.listed else (y, len(busy))


@pytest.mark.parametrize(
    ("listed", "why"),
    [
        (False, r"output 1 is 3 in one run and \d at inputs \(.*return it as a tensor"),
        (
            True,
            r"4 tensors come back in one run and \d at inputs \(.*return the same number always",
        ),
    ],
)
def test_what_branches_on_data_count_is_refused(listed: bool, why: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match=why):
        capture(Busy(listed), (torch.randn(6, 8),))


class Remembering(nn.Module):
    """Returns a cache that keeps the last three of its tokens, and counts all."""

    def forward(self, x: torch.Tensor) -> DynamicSlidingWindowLayer:
        layer = DynamicSlidingWindowLayer(4)
        layer.update(x[:, None], 2 * x[:, None])
        return layer


def test_a_cache_of_transformers_comes_back() -> None:
    """Its first keys are `torch.tensor([])`: torch takes a sum with them apart, and must not give
    the slice behind it the example's length."""
    compiled = moec.compile(Remembering(), (torch.randn(2, 7, 8),))
    for length in (1, 2, 3, 4, 20):
        x = torch.randn(3, length, 8)
        layer, right = compiled(x), Remembering()(x)
        assert isinstance(layer, DynamicSlidingWindowLayer)
        assert layer.cumulative_length == length
        assert torch.equal(layer.keys, right.keys)
        assert torch.equal(layer.values, right.values)
