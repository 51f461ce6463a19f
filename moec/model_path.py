"""Classifies the path of a model without importing torch, so that a typo is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moec.errors import UsageError
from moec.files.checkpoint import check_checkpoint
from moec.files.gguf import is_gguf, read_header
from moec.spelling import did_you_mean_file

Kind = Literal["factory", "checkpoint", "gguf", "pt2"]


def kind_of_model(text: str) -> Kind:
    """The kind of a model's path.

    Raises UsageError where the file or folder does not exist or is of no supported kind, and
    CaptureError where a checkpoint lacks a file, or has a damaged one.
    """
    if not text:
        raise UsageError("the path of the model is empty: give a folder or a file")
    path = Path(text)
    file, colon, _ = text.rpartition(":")
    if colon and file.endswith(".py"):
        if not Path(file).is_file():
            raise UsageError(f"{file} does not exist{did_you_mean_file(Path(file))}")
        return "factory"
    try:
        exists, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise UsageError(f"{text[:80]!r} cannot be the path of a model") from error
    if folder:
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is not a checkpoint: it has no config.json")
        check_checkpoint(path)
        return "checkpoint"
    if path.is_file() and (path.suffix == ".gguf" or is_gguf(path)):
        read_header(path)
        return "gguf"
    if path.suffix == ".pt2" and path.is_file():
        return "pt2"
    if path.suffix == ".py":
        raise UsageError(f"{text}: name the function that returns the model: {text}:factory")
    if not exists:
        near = did_you_mean_file(path)
        forms = "give the folder of a checkpoint, a .gguf or .pt2 file, or file.py:factory"
        raise UsageError(f"{text} does not exist{near or f': {forms} (models are not downloaded)'}")
    raise UsageError(
        f"{text} is not a model that moec can read: give the folder of a checkpoint, a .gguf "
        "or .pt2 file, or file.py:factory"
    )
