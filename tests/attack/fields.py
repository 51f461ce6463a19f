"""Each field of the JSON files of a checkpoint with values of each other type, and numbers without
measure: what is opened is the model, and anything else is one sentence."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moec.capture.doors import open_source
from tests.attack.refusal import READ, faults_of

_TINY = Path(__file__).parents[2] / "examples/tiny_moe/checkpoint"
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "5", 0, 1, -1, 5, 2.5, -0.5, [], {}, [5], ["x"], [[]], [None]),
    *({"": 5}, {"x": {}}, {"5": "x"}, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**9), 1e308),
)
_MEMORY = 3 << 30  # bytes of addresses, as threads of loading have some each
_SIZES = ("num_labels", "num_return_sequences", "max_length", "n_positions", "n_ctx", "id2label")
ABSENT = (
    *_SIZES,
    "quantization_config",
    "text_config",
    "rope_scaling",
    "layer_types",
    "stop_strings",
)
"""Fields that the seed lacks, which transformers reads where they are."""


@functools.cache
def import_all(path: Path = _TINY) -> None:
    """What opening a checkpoint imports is loaded without a limit of memory."""
    open_source(path)


def field_paths(content: Any, within: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to each field, of lists to the first two items only."""
    keys = content if isinstance(content, dict) else range(min(len(content), 2))
    for key in keys:
        yield (*within, key)
        if isinstance(content[key], dict | list):
            yield from field_paths(content[key], (*within, key))


def changed(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    inner = content
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    return content


def faults(folder: Path, file: str, way: tuple[Any, ...], value: Any) -> list[str]:
    import_all()
    path = folder / "case"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(_TINY, path, copy_function=shutil.copy)
    content = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(changed(content, way, value)))
    messages = [fault for fault in faults_of(path, _MEMORY) if fault != READ]
    return [f"{file} {'.'.join(map(str, way))} = {value!r}: {fault}" for fault in messages]


def case(folder: Path, draw: random.Random) -> list[str]:
    """The faults of one field, or one that is absent."""
    file = draw.choice(FILES)
    ways = [*field_paths(json.loads((_TINY / file).read_text())), *((name,) for name in ABSENT)]
    return faults(folder, file, draw.choice(ways), draw.choice(VALUES))
