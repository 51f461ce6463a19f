"""Refuses checkpoints whose files choose code, or other files, that transformers would load, or
hold numbers that are none.

moec sets the implementations of attention and experts itself. Names of transformers' own ones have
no effect; names of anything else are refused before transformers sees them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moec.errors import CaptureError, SetupError
from moec.files.regular_file import check_link

_CODE = frozenset({"auto_map", "custom_pipelines", "fusion_config", "kernel_config"})
_FILES = frozenset({"configuration_files", "transformers_weights"})
_IMPLEMENTATION = re.compile(r"\w*_implementation(_\w+)?|\w*kernels?(_\w+)?")
_OF_TRANSFORMERS = re.compile(r"[\w|-]*")
_REMOTE = re.compile(r"(hf[-_]hub|local-dir):.*", re.DOTALL)  # names of timm's models
_LIMIT = re.compile(r"\w*_(limit|max|min)")  # such as time_step_limit, [0, Infinity] in Mamba
_TOKEN = re.compile(r"(\w+_)?(bos|eos|pad|sep|mask|start|end)_token_id")
ADAPTER_CONFIG = "adapter_config.json"

Fields = Iterator[tuple[str, Any]]


def check_fields(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UsageError, naming the field, where a configuration names code or files."""
    for name, value in fields(config):
        field = name.rpartition(".")[2]
        if field in _CODE and value:
            raise SetupError(
                f"{path.parent} brings its own code ({field}), which moec does not run; load the "
                "model yourself and give it to moec.compile, or write file.py:factory"
            )
        if field in _FILES and value:
            raise SetupError(
                f"{path}: {field} names other files, which moec does not read: keep the "
                "configuration in config.json and the weights in model.safetensors, and remove "
                "the field"
            )
        chosen = _IMPLEMENTATION.fullmatch(field) is not None
        for dotted, text in _texts(name, value):
            if (chosen and not _OF_TRANSFORMERS.fullmatch(text)) or _REMOTE.fullmatch(text):
                raise SetupError(
                    f"{path}: {dotted} is {text!r}, code of the hub, which moec does "
                    "not run: remove the field"
                )


def check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CaptureError, naming the field, for NaN, and for infinity where it is no limit: the
    model would compute nothing but NaN with it."""
    for name, value in fields(config):
        # a value of {"__float__": "Infinity"} is how transformers writes infinity
        field = name.removesuffix(".__float__").rpartition(".")[2]
        for item in _items(value):
            number = _float(item) if name.endswith(".__float__") else item
            if not isinstance(number, float) or math.isfinite(number):
                continue
            if math.isnan(number) or not _LIMIT.fullmatch(field):
                raise CaptureError(
                    f"{path}: {name.removesuffix('.__float__')} is {number}, which is no number "
                    "to compute with: copy the file again from the source of the checkpoint"
                )


def check_types(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CaptureError, naming the field, where moec would read a value of another type."""
    for name, value in fields(config):
        field = name.rpartition(".")[2]
        if value is None or (field != "architectures" and not _TOKEN.fullmatch(field)):
            continue
        names = field == "architectures"
        words = "a list of names" if names else "the number of a token, or a list of them"
        items = value if isinstance(value, list) else [None if names else value]
        if not all(type(item) is (str if names else int) for item in items):
            raise CaptureError(
                f"{path}: {name} is {str(value)[:40]!r}, which is not {words}: copy the file again "
                "from the source of the checkpoint"
            )


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _items(item)
    else:
        yield value


def _float(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def check_folder(folder: Path, names: tuple[str, ...]) -> None:
    """Raises UsageError for an adapter, which transformers would apply or ignore, and where one of
    the files `names`, which are read, is a link to nothing or out of the folder."""
    if (folder / ADAPTER_CONFIG).exists():
        raise SetupError(
            f"{folder} has an adapter ({ADAPTER_CONFIG}) and a model: move the adapter's two files "
            "into another folder, and give that with --adapter to merge it"
        )
    for name in names:
        check_link(folder / name)


def fields(config: Mapping[str, Any], within: str = "") -> Fields:
    """The fields of a configuration and of those in it, by dotted names."""
    for key, value in config.items():
        name = f"{within}{key}"
        yield name, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from fields(inner, f"{name}.")


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts in a value, which may be in lists and objects."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(name, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(f"{name}.{key}", item)
