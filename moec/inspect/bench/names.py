"""The names of benchmark baselines, and what each needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moec.errors import SetupError, UsageError
from moec.spelling import did_you_mean

TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
"""Implementations of experts in transformers."""
BASELINES = (*TRANSFORMERS, "inductor")
PACKAGES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "llama.cpp": "llama-cpp-python",
}
"""Baselines that run a file (of_files.py), and the package of each."""
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".onnx", "llama.cpp": ".gguf"}
"""The suffix of the file that each of those reads."""


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is no baseline."""
    every = (*BASELINES, *PACKAGES)
    for name in names:
        if name not in every:
            near = did_you_mean(name, every) or f"; there are {', '.join(every)}"
            raise UsageError(f"--baseline {name}: no baseline has this name{near}")


def files_of(names: Sequence[str], files: Sequence[Path]) -> dict[str, Path]:
    """The file with the right suffix for each name in PACKAGES.

    Raises UsageError where one is missing or superfluous.
    """
    chosen = {}
    for name in names:
        matching = [file for file in files if file.suffix == SUFFIXES[name]]
        if len(matching) != 1:
            raise UsageError(
                f"--baseline {name} runs a file of yours: give one with --file FILE{SUFFIXES[name]}"
            )
        if not matching[0].is_file():
            raise SetupError(f"--file {matching[0]}: there is no such file")
        chosen[name] = matching[0]
    suffixes = {SUFFIXES[name] for name in names}
    for file in files:
        if file.suffix not in suffixes:
            raise UsageError(
                f"--file {file}: no --baseline reads a {file.suffix or 'nameless'} file"
            )
    return chosen
