"""Output files, checked before any work is done for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason


class OutputFile(click.ParamType[Path]):
    """A file to be written, in an existing folder, with one of `suffixes` if there are any.

    Raises UsageError, naming the option.
    """

    name = "file"

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        option = f"{param.opts[0]} {path}" if param else str(path)
        if self.suffixes and path.suffix not in self.suffixes:
            *most, last = self.suffixes
            endings = f"{', '.join(most)} or {last}" if most else last
            raise UsageError(f"{option}: the name must end in {endings}")
        check_writable(path, option)
        return path


def check_folder(path: Path, name: str) -> None:
    """Raises UsageError, beginning with `name`, where no folder for files can be at `path`."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise SetupError(f"{name}: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise SetupError(f"{name}: {existing} cannot be written: permission denied")


def check_output(path: Path, name: str, *, force: bool) -> None:
    """Raises UsageError, beginning with `name`, where no file can be written at `path`, or one
    exists and is not to be replaced (`force`)."""
    check_writable(path, name)
    if path.exists() and not force:
        raise SetupError(f"{name} exists; --force replaces it")


def check_writable(path: Path, name: str) -> None:
    """Raises UsageError, beginning with `name`, where no file can be written at `path`."""
    if "\0" in str(path) or not path.name:
        raise UsageError(f"{name} is not a valid file name")
    try:
        if path.is_dir():
            raise SetupError(f"{name} is a folder: give the name of a file")
        if not path.parent.is_dir():
            raise SetupError(f"{name}: the folder {path.parent} does not exist: create it first")
    except OSError as error:
        raise SetupError(f"{name} is not a valid file name: {reason(error)}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SetupError(f"{name} cannot be written: permission denied")
