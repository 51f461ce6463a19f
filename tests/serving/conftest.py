"""The model that is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import moec
from tests.serving.running import MODEL, Running, serving


@pytest.fixture(scope="module")
def path(compiled_tiny_moe: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / f"{MODEL}.moec"
    compiled_tiny_moe.save(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> moec.LoadedModel:
    return moec.load(path)


@pytest.fixture(scope="module")
def shared(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model) as running:
        yield running
