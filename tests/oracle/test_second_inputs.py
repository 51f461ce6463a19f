"""Layers whose second input matters at some sizes only are compiled right or refused, and those
whose formula is one for all sizes compile for all. Eager is the judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moec
import moec.dynamo  # registers the backend where moec is not installed
from moec.export.session import open_session, runner
from tests.fuzz.judge import interpreted
from tests.oracle.experts import Routed
from tests.oracle.second_inputs import (
    LAYERS,
    Run,
    captured,
    difference,
    example,
    judge,
    layer,
    parameters,
)
from tests.oracle.values import inputs


@pytest.mark.parametrize("name", LAYERS)
def test_captured(name: str) -> None:
    verdict = judge(name, captured)
    assert list(verdict.wrong) == []
    assert not LAYERS[name].general or (verdict.reason, list(verdict.refused)) == ("", [])


COMPILED = (
    *("KeepUnlessOneText", "PadUnlessOneToken", "KeepOfManyTokens", "LengthsOfManyTexts"),
    *("Rotary", "Temperature", "DecodeAlike"),
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    verdict = judge(name, lambda module: moec.compile(module, example(module)))
    assert list(verdict.wrong) == []
    assert not LAYERS[name].general or (verdict.reason, list(verdict.refused)) == ("", [])


@pytest.mark.parametrize("name", ["MaskOfManyTexts", "KeepOfManyTokens", "LastOfText", "Steps"])
def test_pt2(name: str, tmp_path: Path) -> None:
    """The file declares the sizes: it has the side of the example only."""

    def compile(module: Routed) -> Run:
        tensors = example(module)
        shapes = tuple(dict.fromkeys(range(t.ndim), torch.export.Dim.AUTO) for t in tensors)
        exported = torch.export.export(module, tensors, dynamic_shapes=shapes)
        torch.export.save(exported, tmp_path / "layer.pt2")
        return interpreted(moec.compile(tmp_path / "layer.pt2", build=False, verify=False))

    verdict = judge(name, compile)
    assert list(verdict.wrong) == []
    assert len(verdict.refused) < verdict.calls


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    moec.stats(reset=True)
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", ["MaskOfManyTexts", "LengthsOfManyTexts", "MeanOfKept", "Noise"])
def test_torch_compile(name: str) -> None:
    """Nothing is refused: torch.compile traces again where a size takes the other side."""

    def compile(module: Routed) -> Run:
        options = {"rest": "eager", "strict": True}
        run: Run = torch.compile(module, backend="moec", dynamic=True, options=options)
        return run

    verdict = judge(name, compile)
    assert (list(verdict.wrong), list(verdict.refused)) == ([], [])
    assert moec.stats().blocks


@pytest.mark.parametrize("name", ["KeepUnlessOneText", "WhereKept", "PaddingOnTheLeft", "Scale"])
def test_onnx(name: str, tmp_path: Path) -> None:
    """At the sizes that the file is for, which are those of the graph."""

    def compile(module: Routed) -> Run:
        compiled = moec.compile(module, example(module), build=False)
        compiled.export_onnx(tmp_path / "layer.onnx")
        graph, run = interpreted(compiled), runner(open_session(tmp_path / "layer.onnx"))

        def call(*tensors: Tensor) -> Any:
            graph(*tensors)
            (output,) = run(dict(zip(parameters(module), tensors, strict=True))).values()
            return output

        return call

    verdict = judge(name, compile)
    assert list(verdict.wrong) == []


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
