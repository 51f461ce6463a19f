"""Each test starts with nothing compiled, nothing counted, and a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moec
import moec.dynamo  # registers the backend where moec is not installed


@pytest.fixture(autouse=True)
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    moec.stats(reset=True)
    yield
    torch._dynamo.reset()
