"""Each test starts without compiled blocks and with counters at zero."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moec
import moec.dynamo  # registers the backend where moec is not installed
from moec.cache import OBJECTS


@pytest.fixture(autouse=True)
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, but for the kernels, which all tests share."""
    folder, shared = tmp_path / "cache", Path(os.environ["MOEC_CACHE"]) / OBJECTS
    folder.mkdir(mode=0o700)
    shared.mkdir(mode=0o700, exist_ok=True)
    (folder / OBJECTS).symlink_to(shared)
    monkeypatch.setenv("MOEC_CACHE", str(folder))
    torch._dynamo.reset()
    moec.stats(reset=True)
    yield
    torch._dynamo.reset()
