"""The survey from Gemini to Q*: each cell of its matrix is a model that is compiled, or trained,
and compared with eager."""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import pytest
import torch

import moec
from docs.surveys import Cell, Survey
from docs.systems import Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of
from tests.systems.surveys import KeepSurvey, gradients_agree

example = load("15_gemini_to_qstar")
SOURCE = Source(
    number=15,
    title="Survey: from Gemini to Q*",
    paper="2312.10868",
    example="15_gemini_to_qstar",
    process="survey",
    modalities=("text", "image", "audio", "video"),
    adds="The survey's architectures and applications as a matrix of tests (docs/surveys.md). A "
    "recurrent model with experts is compiled as a step, whose loop is the caller's.",
    trained="random inputs",
)
TOLERANCE = 1e-5  # float32, one block, or six steps of a state below 1
SIZES = example.Sizes(vocabulary=16, width=8, hidden=12, experts=3)
DENSE = "moec trains blocks of experts (`torch.compile`); a dense model's training is PyTorch's"


@functools.cache
def model(architecture: str) -> Any:
    torch.manual_seed(0)
    return example.build(architecture, SIZES)


@functools.cache
def compiled(architecture: str) -> CompiledModel:
    return example.compiled(model(architecture), architecture, SIZES)


@pytest.mark.parametrize("modality", example.MODALITIES)
@pytest.mark.parametrize("architecture", example.ARCHITECTURES)
def test_infer(architecture: str, modality: str) -> None:
    artifact = compiled(architecture)
    assert len(artifact.blocks) == (architecture != "transformer")
    inputs = example.sequences(modality, SIZES)
    with torch.no_grad():
        expected = example.answers(model(architecture), architecture, inputs, SIZES)
    answers = example.answers(artifact, architecture, inputs, SIZES)
    torch.testing.assert_close(answers, expected, rtol=TOLERANCE, atol=TOLERANCE)


def step_of(architecture: str, modality: str) -> tuple[torch.Tensor, ...]:
    """What one call takes: a step of the recurrent model, sequences of the others."""
    if architecture != "recurrent":
        return example.sequences(modality, SIZES)
    return example.step_inputs(modality, SIZES)


@pytest.mark.parametrize("modality", example.MODALITIES)
@pytest.mark.parametrize("architecture", ["recurrent", "moe"])
def test_train(architecture: str, modality: str) -> None:
    gradients_agree(model(architecture), step_of(architecture, modality), TOLERANCE)


def test_dense_training_is_left_alone() -> None:
    before = moec.stats().blocks
    gradients_agree(model("transformer"), step_of("transformer", "text"), TOLERANCE, blocks=False)
    assert moec.stats().blocks == before


def cells() -> tuple[Cell, ...]:
    rows = []
    for architecture, modality in product(example.ARCHITECTURES, example.MODALITIES):
        rows.append(
            Cell(f"{architecture}, infer", modality, f"test_infer[{architecture}-{modality}]")
        )
        if architecture == "transformer":
            name, reason = "test_dense_training_is_left_alone", DENSE
        else:
            name, reason = f"test_train[{architecture}-{modality}]", ""
        rows.append(Cell(f"{architecture}, train", modality, name, reason))
    return tuple(rows)


def test_matrix(keep_survey: KeepSurvey, request: pytest.FixtureRequest) -> None:
    survey = Survey(
        15, "From Gemini to Q*", SOURCE.paper, request.node.nodeid.split("::")[0], cells()
    )
    assert len(survey.cells) == 3 * 4 * 2
    keep_survey(survey)


def test_record(keep: Keep) -> None:
    missing = (
        "attention over [N, S, D] without an axis of heads: aten.scaled_dot_product_attention has "
        "a kernel for [N, heads, S, D] alone; the transformers here have two heads",
    )
    keep(record_of(compiled("recurrent"), SOURCE, f"{TOLERANCE:g}", (), missing))
