"""The files that calibration data come from, checked before torch is imported.

Data may come from several named domains: NAME=FILE,NAME=FILE, or a mapping of names to data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.errors import SetupError, UsageError

SUFFIXES = (".npz", ".safetensors", ".txt")


def data_by_domain(calib: Any) -> dict[str, Any]:
    """The data of each domain, by name; data without domains have the name "".

    Raises UsageError for a text that names only some of its domains.
    """
    if isinstance(calib, str) and "=" in calib and not Path(calib).is_file():
        files: dict[str, Any] = {}
        for part in calib.split(","):
            name, _, file = (piece.strip() for piece in part.partition("="))
            if not name or not file or name in files:
                raise UsageError(
                    f"--calib {calib}: write NAME=FILE,NAME=FILE with a different name for each "
                    "domain"
                )
            files[name] = file
        return files
    if isinstance(calib, Mapping) and any(
        isinstance(v, str | Path | Mapping) for v in calib.values()
    ):
        return dict(calib)
    return {"": calib}


def check(calib: Any) -> None:
    """Raises UsageError for data that are wrong for any model, before a model is loaded."""
    for name, data in data_by_domain(calib).items():
        label = data_label(name, data)
        if isinstance(data, str | Path):
            path = Path(data)
            if path.suffix not in SUFFIXES:
                raise UsageError(
                    f"{label}: calibration data must be a file of type {', '.join(SUFFIXES)}"
                )
            if not path.is_file():
                raise SetupError(f"{label}: there is no such file")
        elif not isinstance(data, Mapping):
            raise UsageError(
                f"{label} is a {type(data).__name__}: give the path of a file, or tensors by "
                "input name"
            )


def data_label(name: str, data: Any) -> str:
    """The data of a domain as the user wrote them, for messages."""
    if isinstance(data, str | Path):
        return f"--calib {name}={data}" if name else f"--calib {data}"
    return f"calib[{name!r}]" if name else "calib"
