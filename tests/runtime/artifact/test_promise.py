"""What docs/artifact.md promises of formats: an artifact of 0.2 loads in each 0.2.x, and a later
version loads it or says how to make it again."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.command_line import invoke

STORED = sorted((Path(__file__).parent / "stored").iterdir())
PROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.name)
def test_an_artifact_of_an_earlier_version(stored: Path) -> None:
    version = tomllib.loads(PROJECT.read_text())["project"]["version"]
    result = invoke("run", str(stored), "--rebuild", "--check")
    if version.startswith(f"{stored.name}.") or result.exit_code == 0:
        assert "1 sample agrees" in result.output, result.stderr
    else:
        assert "make it again by moec compile" in result.stderr
