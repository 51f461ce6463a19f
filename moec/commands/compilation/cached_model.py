"""The artifact of a model that a command is to run, compiled into the cache if it is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click

from moec.cache import MODELS, default_store
from moec.commands.compilation.checkpoint_key import checkpoint_key
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.errors import SetupError
from moec.files import hub_files
from moec.model_path import is_of_hub


def artifact_of(model: Path, quiet: bool = False) -> Path:
    """The path itself, or of a checkpoint, a GGUF file or an id of the hub its artifact in the
    cache. Without one the model is compiled, in a process of its own, and verified.

    Raises UsageError where the cache cannot be used; a compilation that fails ends the command with
    its exit code, after its message.
    """
    text = str(model)
    if not is_model(model):
        return model
    store = default_store()
    if store.folder is None:
        raise SetupError(
            f"{text} is compiled into the cache, which is off or cannot be used: set MOEC_CACHE to "
            f"a folder of your own, or run what moec compile {text} -o NAME.moec writes"
        )
    path = text if model.exists() else local_model(text, None, quiet)
    key = checkpoint_key(path, {"for": "commands that run models"})
    value = None if key is None else key.value()
    if value is None:
        raise SetupError(f"the files of {text} change: run it when they are written")
    name = hub_files.short_name(Path(path)).rpartition("/")[2].removesuffix(".gguf")
    name = re.sub(r"[^\w.-]+", "-", name)
    artifact = store.folder / MODELS / f"{name}-{value[:16]}{value[-16:]}.moec"
    if not artifact.is_file():
        if not quiet:
            echo(f"{text} is compiled, once: moec cache list shows what is kept", err=True)
        artifact.parent.mkdir(mode=0o700, exist_ok=True)
        words = [sys.executable, "-m", "moec", "compile", path, "-o", str(artifact), "--force"]
        words += ["--quiet"] * quiet
        if code := subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode:
            click.get_current_context().exit(code if code > 0 else 128 - code)
    os.utime(artifact)  # used last
    return artifact


def is_model(path: Path) -> bool:
    """Whether the path is of a model that is compiled first, and not of an artifact."""
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "manifest.json").exists()
    if path.exists():
        return path.suffix == ".gguf"
    return path.suffix != ".moec" and is_of_hub(str(path))
