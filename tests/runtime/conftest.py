"""The toy model as a package and as an artifact on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.runtime.artifact import artifact
from moec.runtime.package import Package
from tests.runtime import toy


@pytest.fixture(scope="session")
def package() -> Package:
    return toy.package()


@pytest.fixture(scope="session")
def original(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that no test may change."""
    path = tmp_path_factory.mktemp("toy") / "toy.moec"
    artifact.write(
        package, path, graphs={"main": toy.GRAPH}, samples=[toy.sample(package)], tolerance=1e-5
    )
    return path


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    path = tmp_path / "toy.moec"
    path.write_bytes(original.read_bytes())
    return path


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with its tokenizer: a is followed by b, and so on; h ends the text."""
    path = tmp_path_factory.mktemp("speaker") / "speaker.moec"
    artifact.write(
        toy.language_model(), path, graphs={"main": toy.GRAPH}, files=toy.tokenizer_files()
    )
    return path
