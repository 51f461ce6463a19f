"""The survey of multimodal generation: each cell of its matrix is a model that is compiled, or
trained, and compared with eager."""

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

example = load("10_multimodal_generative")
SOURCE = Source(
    number=10,
    title="Survey: multimodal generative AI",
    paper="2409.14993",
    example="10_multimodal_generative",
    process="survey",
    modalities=("text", "image", "video"),
    adds="The survey's axes as a matrix of tests (docs/surveys.md). One artifact serves texts, "
    "images and videos, together or alone: each may be of length 0.",
    trained="random inputs",
)
TOLERANCE = 1e-5  # float32, one block
SIZES = example.Sizes(vocabulary=16, width=8, hidden=12, experts=3)
KINDS = tuple(product(example.PROBABILITIES, example.ARCHITECTURES))
DENSE = "moec trains blocks of experts (`torch.compile`); a dense model's training is PyTorch's"


@functools.cache
def model(probability: str, architecture: str) -> Any:
    torch.manual_seed(0)
    return example.build(probability, architecture, SIZES)


@functools.cache
def compiled(probability: str, architecture: str) -> CompiledModel:
    return example.compiled(model(probability, architecture), probability, SIZES)


def inputs_of(probability: str, modality: str) -> tuple[torch.Tensor, ...]:
    batch = example.Batch.random(modality, SIZES)
    return example.inputs_of(probability, batch, SIZES)


@pytest.mark.parametrize("modality", example.MODALITIES)
@pytest.mark.parametrize(("probability", "architecture"), KINDS)
def test_infer(probability: str, architecture: str, modality: str) -> None:
    artifact = compiled(probability, architecture)
    assert len(artifact.blocks) == (architecture == "moe")
    inputs = inputs_of(probability, modality)
    with torch.no_grad():
        expected = model(probability, architecture)(*inputs)
    torch.testing.assert_close(artifact(*inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("modality", example.MODALITIES)
@pytest.mark.parametrize("probability", example.PROBABILITIES)
def test_train(probability: str, modality: str) -> None:
    """A step's loss and gradients; the block runs on moec's kernels."""
    gradients_agree(model(probability, "moe"), inputs_of(probability, modality), TOLERANCE)


@pytest.mark.parametrize("probability", example.PROBABILITIES)
def test_dense_training_is_left_alone(probability: str) -> None:
    before = moec.stats().blocks
    gradients_agree(
        model(probability, "dense"), inputs_of(probability, "text"), TOLERANCE, blocks=False
    )
    assert moec.stats().blocks == before


def cells() -> tuple[Cell, ...]:
    rows = []
    for (probability, architecture), modality in product(KINDS, example.MODALITIES):
        line = f"{probability}, {architecture}"
        name = f"test_infer[{probability}-{architecture}-{modality}]"
        rows.append(Cell(f"{line}, infer", modality, name))
        if architecture == "moe":
            rows.append(Cell(f"{line}, train", modality, f"test_train[{probability}-{modality}]"))
        else:
            name = f"test_dense_training_is_left_alone[{probability}]"
            rows.append(Cell(f"{line}, train", modality, name, DENSE))
    return tuple(rows)


def test_matrix(keep_survey: KeepSurvey, request: pytest.FixtureRequest) -> None:
    survey = Survey(
        10, "Multi-modal generative AI", SOURCE.paper, request.node.nodeid.split("::")[0], cells()
    )
    assert len(survey.cells) == 3 * 2 * 4 * 2
    keep_survey(survey)


def test_record(keep: Keep) -> None:
    keep(record_of(compiled("hybrid", "moe"), SOURCE, f"{TOLERANCE:g}"))
