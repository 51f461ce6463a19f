"""Layers whose second input matters at some sizes only are compiled right or refused, and those
whose formula is one for all sizes compile for all. Eager is the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from tests.oracle.doors import DOORS, Run
from tests.oracle.experts import Routed
from tests.oracle.second_inputs import LAYERS, difference, judge, layer
from tests.oracle.values import inputs, parameters


def through(door: str, folder: Path) -> Callable[[Routed], Run]:
    return lambda module: DOORS[door](module, folder)


@pytest.mark.parametrize("name", LAYERS)
def test_captured(name: str, tmp_path: Path) -> None:
    verdict = judge(name, through("graph", tmp_path))
    assert list(verdict.wrong) == []
    assert not LAYERS[name].general or (verdict.reason, list(verdict.refused)) == ("", [])


COMPILED = (
    *("KeepUnlessOneText", "PadUnlessOneToken", "KeepOfManyTokens", "LengthsOfManyTexts"),
    *("Rotary", "Temperature", "DecodeAlike"),
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, tmp_path: Path) -> None:
    verdict = judge(name, through("code", tmp_path))
    assert list(verdict.wrong) == []
    assert not LAYERS[name].general or (verdict.reason, list(verdict.refused)) == ("", [])


@pytest.mark.parametrize("name", ["MaskOfManyTexts", "KeepOfManyTokens", "LastOfText", "Steps"])
def test_pt2(name: str, tmp_path: Path) -> None:
    verdict = judge(name, through("pt2", tmp_path))
    assert list(verdict.wrong) == []
    assert len(verdict.refused) < verdict.calls


@pytest.fixture
def reset_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("reset_dynamo")
@pytest.mark.parametrize("name", ["MaskOfManyTexts", "LengthsOfManyTexts", "MeanOfKept", "Noise"])
def test_torch_compile(name: str, tmp_path: Path) -> None:
    """Nothing is refused: torch.compile traces again where a size takes the other side."""
    verdict = judge(name, through("torch.compile", tmp_path))
    assert (list(verdict.wrong), list(verdict.refused)) == ([], [])
    assert moec.stats().blocks
    assert moec.stats().fallbacks == ()


@pytest.mark.parametrize("name", ["KeepUnlessOneText", "WhereKept", "PaddingOnTheLeft", "Scale"])
def test_onnx(name: str, tmp_path: Path) -> None:
    assert list(judge(name, through("onnx", tmp_path)).wrong) == []


def test_command(tmp_path: Path) -> None:
    verdict = judge("PadUnlessOneToken", through("command", tmp_path))
    assert (verdict.reason, list(verdict.wrong)) == ("", [])


@pytest.mark.parametrize("name", LAYERS)
def test_the_judge_sees_that_a_second_input_is_ignored(name: str) -> None:
    """And nothing wrong in eager itself."""

    def ignoring(module: Routed) -> Run:
        def run(x: Tensor, *others: Tensor) -> Any:
            B, S = x.shape[:2] if x.ndim == 3 else (1, len(x))
            return module(x, *inputs(parameters(module), B, S, 0)[1][1:])

        return run

    assert len(judge(name, ignoring).wrong) >= 8
    assert judge(name, lambda module: module).wrong == ()


def test_a_difference_has_words() -> None:
    x, nan = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert difference(x * (1 + 1e-5), x) == difference(nan, nan) == difference(x * 0, x * 0) == ""
    assert all(difference(a, x) for a in (x * 1.001, nan, x.double(), x[None], (x, x)))
    assert difference(x, nan)
    assert difference(x * 1e-9, x * 0)


def test_there_are_sixty_layers_with_a_second_input() -> None:
    assert len(LAYERS) == 60
    assert all(len(parameters(layer(name))) > 1 for name in LAYERS)
