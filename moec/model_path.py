"""Classifies the name of a model without importing torch, so that a typo is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moec.errors import SetupError, UsageError
from moec.files import hub_files
from moec.files.adapter import base_of
from moec.files.checkpoint import check_checkpoint
from moec.files.config_fields import ADAPTER_CONFIG
from moec.files.gguf import is_gguf, read_header
from moec.spelling import did_you_mean_file

Kind = Literal["factory", "checkpoint", "gguf", "pt2", "onnx", "hub"]
_FORMS = (
    "give the folder of a checkpoint, a .gguf, .pt2 or .onnx file, file.py:factory, or ORG/NAME of "
    "the hub"
)


def local_path(text: str, revision: str | None = None) -> str:
    """The path of a model; that of the hub, at `revision`, is downloaded.

    Raises UsageError where it cannot be, or where a path has a revision.
    """
    if is_of_hub(text):
        return str(hub_files.download(hub_files.find(text, revision)))
    check_no_revision(text, revision)
    return text


def is_of_hub(text: str) -> bool:
    """Whether text is the id of a model of the hub, and no path that exists."""
    return hub_files.is_id(text) and not Path(text).exists()


def check_no_revision(text: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(
            f"{text} is no id of the hub, and only these have revisions: leave {revision!r} out"
        )


def kind_of_model(text: str) -> Kind:
    """The kind of a model's path, or "hub" for an id where there is no such path.

    Raises UsageError where the file or folder does not exist or is of no supported kind, and
    CaptureError where a checkpoint lacks a file, or has a damaged one.
    """
    if not text:
        raise UsageError("the path of the model is empty: give a folder or a file")
    path = Path(text)
    file, colon, _ = text.rpartition(":")
    if colon and file.endswith(".py"):
        if not Path(file).is_file():
            raise SetupError(f"{file} does not exist{did_you_mean_file(Path(file))}")
        return "factory"
    try:
        exists, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise UsageError(f"{text[:80]!r} cannot be the path of a model") from error
    if folder:
        if not (path / "config.json").is_file() and (path / ADAPTER_CONFIG).is_file():
            base = base_of(path) or "MODEL"
            raise UsageError(f"{path} is an adapter: give the model, {base} --adapter {path}")
        if not (path / "config.json").is_file():
            raise SetupError(f"{path} is not a checkpoint: it has no config.json")
        for other in sorted(path.iterdir()):
            if other.exists() and not (other.is_file() or other.is_dir()):
                raise SetupError(f"{other} is not a regular file: reading it might never end")
        check_checkpoint(path)
        return "checkpoint"
    if path.is_file() and (path.suffix == ".gguf" or is_gguf(path)):
        read_header(path)
        return "gguf"
    if path.suffix == ".pt2" and path.is_file():
        return "pt2"
    if path.suffix == ".onnx" and path.is_file():
        return "onnx"
    if path.suffix == ".py":
        raise UsageError(f"{text}: name the function that returns the model: {text}:factory")
    if not exists:
        if is_of_hub(text):
            return "hub"
        raise SetupError(f"{text} does not exist{did_you_mean_file(path) or f': {_FORMS}'}")
    raise SetupError(f"{text} is not a model that moec can read: {_FORMS}")
