"""Damaged or forged artifacts, and the messages that refuse them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.errors import ArtifactError
from moec.runtime.artifact import manifest
from moec.runtime.call import executor


def refused(path: Path) -> str:
    """The words that refuse the artifact, whether it is looked at or loaded."""
    with pytest.raises(ArtifactError) as caught:
        executor.load(path)
    words = str(caught.value)
    assert "\n" not in words
    assert str(path) in words
    return words


def unpacked(path: Path) -> Path:
    folder = path.with_suffix(".folder")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest and updates its digests, as a forger would."""
    path = folder / "manifest.json"
    text = json.loads(path.read_bytes())
    change(text)
    body = {key: value for key, value in text.items() if key not in ("moec", "sha256")}
    text["sha256"] = manifest.digest_of(text["moec"], body)
    path.write_text(json.dumps(text))


def edit_package(folder: Path, **changes: Any) -> None:
    edit_manifest(folder, lambda text: text["package"].update(changes))


def add_member(path: Path, name: str, **how: Any) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x" * 100, **how)


def same(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array)
