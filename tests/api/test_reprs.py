"""The reprs of moec's objects in a prompt and a notebook are short and readable."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
import torch

import moec
from moec.errors import InputError
from moec.runtime.artifact import artifact
from tests.runtime import toy


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> moec.LoadedModel:
    path = tmp_path_factory.mktemp("reprs") / "speaker.moec"
    files = toy.tokenizer_files()
    artifact.write(toy.language_model(), path, graphs={"main": toy.GRAPH}, files=files)
    return moec.load(path)


def test_the_names_of_the_package() -> None:
    assert dir(moec) == sorted([*moec.__all__, "__version__"])
    assert moec.__version__


def test_reprs_are_short(speaker: moec.LoadedModel) -> None:
    target = speaker.artifact.package.target_name
    assert repr(speaker) == f"<speaker.moec for {target}: takes input_ids, attention_mask>"
    package = f"<package for {target}: main>"
    path = speaker.path
    parts = len(speaker.artifact.manifest.parts)
    assert repr(speaker.artifact) == f"<artifact {path}: {parts} parts, {package}>"
    assert speaker._repr_html_() == f"<pre>{html.escape(repr(speaker))}</pre>"
    assert repr(speaker.tokenizer) == "<tokenizer of 8 tokens>"


def test_a_model_and_its_report() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
    model = moec.compile(module, (torch.zeros(3, 8),), build=False, verify=False)
    assert repr(model).endswith(": 0 MoE blocks>")
    for item in (model, model.report()):
        assert item._repr_html_() == f"<pre>{html.escape(str(item))}</pre>"


def test_tokens_that_are_none(speaker: moec.LoadedModel, tmp_path: Path) -> None:
    tokenizer = speaker.tokenizer
    assert tokenizer.decode(torch.tensor([1, 2])) == tokenizer.decode([1, 2])  # type: ignore[arg-type]
    for tokens in (5, ["x"], [-1], [1 << 40], None):
        with pytest.raises(InputError, match="give a list of token ids"):
            tokenizer.decode(tokens)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the prompt is 5: give text"):
        tokenizer.encode(5)  # type: ignore[arg-type]
