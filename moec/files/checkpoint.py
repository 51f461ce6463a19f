"""Checks the files of a Hugging Face checkpoint before torch is imported."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moec.errors import CaptureError
from moec.files.config_fields import check_fields, check_folder, check_numbers, check_types
from moec.files.os_errors import reason
from moec.files.regular_file import check_link, read_regular
from moec.files.safetensors import INDEX, SINGLE, read_entries, weight_files

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_JSON = (CONFIG, GENERATION_CONFIG, "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    GENERATION_CONFIG,
    "chat_template.jinja",
)
"""The files that an artifact has a copy of."""
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|(en|de)coder_layers")
_SIZES = re.compile(
    r"(vocab|(\w+_)?(hidden|intermediate))_size|d_model|d_ff|n_embd|head_dim|\w+_(experts|heads)|n_head"
)
_COUNTS = re.compile(r"num_labels|\w+_(experts|heads|groups?)|n_head")
_PACKED = 8  # codes in a number, at most
_SHARED_LAYERS = 1000  # may be more than there are tensors: layers can share their weights


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The configuration of the checkpoint.

    Raises CaptureError, naming the file, where a required file is missing or malformed, where a
    configuration has NaN or is far too large for the weights, and UsageError where a file names
    code or other files.
    """
    check_folder(folder, (CONFIG, SINGLE, INDEX, *TOKENIZER_FILES))
    contents = {name: json_object(folder / name) for name in _JSON if (folder / name).exists()}
    for name in (CONFIG, GENERATION_CONFIG):
        check_fields(folder / name, contents.get(name, {}))
        check_numbers(folder / name, contents.get(name, {}))
        check_types(folder / name, contents.get(name, {}))
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        _check_index(folder)
    files = weight_files(folder)
    if not files:
        raise CaptureError(f"{folder} has no .safetensors; save the model with save_pretrained")
    if len(files) > 1 and not (folder / INDEX).exists():
        raise CaptureError(f"{folder} has several .safetensors, and no {INDEX} that names them")
    shapes = [list(entry.shape) for entry in read_entries(files).values()]
    _check_sizes(folder / CONFIG, contents[CONFIG], shapes)
    return contents[CONFIG]


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder. Raises CaptureError, naming the file, where there is
    none, and UsageError where it is a link out of the folder."""
    check_link(path)
    try:
        content = json.loads(read_regular(path))
    except OSError as error:
        raise CaptureError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise CaptureError(
            f"{path} is not JSON: {error}; copy it again from the source of the checkpoint"
        ) from None
    if not isinstance(content, dict):
        what = "configuration of a model" if path.name == CONFIG else "JSON object"
        raise CaptureError(f"{path} has no {what}; copy it again from the source of the checkpoint")
    return content


def _check_index(folder: Path) -> None:
    path = folder / INDEX
    files = json_object(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CaptureError(f"{path} has no weight_map, which names the file of each weight")
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise CaptureError(f"{path} names {name!r}, which is not in its folder")
        if not (folder / name).is_file():
            raise CaptureError(
                f"{path} names {name!r}, which does not exist: copy it again from the source of "
                "the checkpoint"
            )


def _check_sizes(path: Path, config: Mapping[str, Any], shapes: list[list[int]]) -> None:
    """Raises CaptureError for a configuration that the weights contradict: transformers would first
    build a model of, say, a billion layers until the system kills the process."""
    elements = sum(map(math.prod, shapes))
    longest = max((size * _PACKED for shape in shapes for size in shape), default=0)
    for name, number in _numbers(config):
        if _LAYERS.fullmatch(name) and number > max(len(shapes), _SHARED_LAYERS):
            present = f"{len(shapes):,} tensors"
        elif _SIZES.fullmatch(name) and number > elements:
            present = f"{elements:,} numbers"
        elif _COUNTS.fullmatch(name) and number > max(longest, len(shapes), _SHARED_LAYERS):
            present = f"no dimension of more than {longest:,}"
        else:
            continue
        raise CaptureError(
            f"{path}: {name} is {number:,}, and the weights next to it hold {present}: they are of "
            "different models"
        )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The integers of a configuration and of its nested configurations."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield name, value
