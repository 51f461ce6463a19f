"""What was measured before, on disk: a small JSON file for each kernel, target and machine.

The key is the SHA-256 of all that the result depends on. A file that is damaged, or that others
may write, counts as none, and is replaced.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from moec import cache_folder
from moec.codegen.cpu.tuning import Tuning, of_dict
from moec.codegen.tuning.choose import Gain


def load(folder: Path, key: str) -> tuple[Tuning, Gain | None] | None:
    """What `store` kept under a key; None where there is nothing that can be used."""
    path = _path(folder, key)
    try:
        if not cache_folder.private(folder) or not cache_folder.private(path):
            return None
        text = json.loads(path.read_text(encoding="utf-8"))
        if text["key"] != key:
            return None
        return of_dict(text["values"]), _gain(text["gain"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store(folder: Path, key: str, kernel: str, tuning: Tuning, gain: Gain | None) -> None:
    """Keep a result. Raises UsageError where the folder cannot be written, or by others too."""
    cache_folder.make(folder, "and what is there is believed: chmod 700 it, or set MOEC_CACHE")
    text = {
        "key": key,
        "kernel": kernel,
        "values": tuning.changed(),
        "gain": None if gain is None else {str(t): pair for t, pair in gain.by_tokens.items()},
    }
    handle, name = tempfile.mkstemp(dir=folder, prefix=".tuning-")  # for this user alone
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(text, file)
    os.replace(name, _path(folder, key))


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.tuning.json"


def _gain(recorded: Mapping[str, tuple[float, float]] | None) -> Gain | None:
    if recorded is None:
        return None
    return Gain({int(t): (float(gain), float(error)) for t, (gain, error) in recorded.items()})
