"""Writes safetensors in shards, as the hub has them. Only the tensors of one group are in memory:
the header of a file comes from sizes alone."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.files.safetensors import BITS, INDEX, SINGLE

LOGGER = logging.getLogger(__name__)
LARGEST = 5_000_000_000
"""The most bytes of a shard."""


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: its dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are computed together when written: `read` gives the buffer of each."""

    tensors: tuple[NewTensor, ...]
    read: Callable[[], Sequence[Any]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def write_shards(
    folder: Path,
    groups: Sequence[TensorGroup],
    largest: int,
    progress: Callable[[str], None],
) -> list[Path]:
    """Writes the groups in order, into files of at most `largest` bytes (a larger group has a file
    by itself), with an index where there are several."""
    shards = list(_shards(groups, largest))
    count = len(shards)
    paths = [
        folder / (SINGLE if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors")
        for i in range(count)
    ]
    written, total = 0, sum(group.nbytes for group in groups)
    for i, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        progress(f"write {i + 1}/{count} files")
        for size in _write(path, shard):
            written += size
            detail = f"{i + 1}/{count} files, {written / 1e9:.1f} of {total / 1e9:.1f} GB"
            LOGGER.debug("write %s", detail, extra={"share": written / total, "detail": detail})
    if count > 1:
        weight_map = {
            tensor.name: path.name
            for path, shard in zip(paths, shards, strict=True)
            for group in shard
            for tensor in group.tensors
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return paths


def _shards(groups: Sequence[TensorGroup], largest: int) -> Iterator[list[TensorGroup]]:
    shard: list[TensorGroup] = []
    size = 0
    for group in groups:
        if shard and size + group.nbytes > largest:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += group.nbytes
    yield shard


def _write(path: Path, groups: Sequence[TensorGroup]) -> Iterator[int]:
    """Writes a file; yields the bytes of each group after it is written."""
    # Readers need aligned tensors, and files without gaps: wide elements come first.
    tensors = sorted(
        (tensor for group in groups for tensor in group.tensors), key=lambda t: -BITS[t.dtype]
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for tensor in tensors:
        starts[tensor.name], end = end, end + tensor.nbytes
        offsets = [starts[tensor.name], end]
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in groups:
            for tensor, data in zip(group.tensors, group.read(), strict=True):
                file.seek(8 + len(text) + starts[tensor.name])
                file.write(data)
            yield group.nbytes
