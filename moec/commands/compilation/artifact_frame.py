"""The frame of an artifact: its file without the weights that follow from the checkpoint's files.

A large artifact is mostly weights, which the user has already: they are tensors of the checkpoint,
some in another order. A frame holds the other bytes of the artifact, and for each part that is left
out its place, its SHA-256, and the strided copies that make it from the files. Completing a frame
gives exactly the file that it was made from, or nothing: a part whose hash differs is refused,
whatever the reason.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from moec.commands.compilation.weight_origins import Origins, origins_of
from moec.runtime.arrays.strided_copy import StridedCopy, copied
from moec.runtime.artifact import manifest as manifests
from moec.runtime.artifact.container import part_spans
from moec.runtime.artifact.part_writers import on_all_cores, write_hashed

if TYPE_CHECKING:
    from moec.model.compiled import CompiledModel
    from moec.runtime.dtypes import Array

_LEAST = 1 << 12  # bytes of a part that is worth leaving out


@dataclass(frozen=True)
class LeftOut:
    """A part of the file, at `start`, that `copies` make from the checkpoint's files."""

    start: int
    size: int
    sha256: str
    copies: tuple[StridedCopy, ...]


@dataclass(frozen=True)
class Frame:
    """A file of `size` bytes: `content` in order, with the parts that are left out in between.
    `files` are the names of the checkpoint's files that they are copied from."""

    size: int
    files: tuple[str, ...]
    parts: tuple[LeftOut, ...]
    content: bytes


def frame_of(compiled: CompiledModel, artifact: Path, folder: Path, most: int) -> Frame | None:
    """The frame of the artifact of a model that was compiled from the checkpoint in `folder`. None
    where it would hold more than `most` bytes of the artifact, where the model is for more than one
    kind of target, or where its weights are not in memory."""
    if compiled.package is None or compiled.for_gpu or compiled.source.memory.paged:
        return None
    paths = sorted(folder.glob("*.safetensors"))  # all were checked when the model was opened
    files = [(path, _mapped(path)) for path in paths]
    origins = origins_of(files, _memories(compiled))
    content = _mapped(artifact)
    spans = part_spans(artifact, lambda start, size: content[start : start + size])
    manifest = manifests.load(content[spans[manifests.NAME]])
    parts: dict[str, LeftOut] = {}
    for name, stored in manifest.arrays.items():
        span, array = spans[stored.part], compiled.package.arrays[name]
        if stored.part in parts or stored.nbytes < _LEAST:
            continue
        copies = _copies(origins, array, compiled.package.copies.get(name))
        if copies is not None:
            sha256 = manifest.parts[stored.part].sha256
            parts[stored.part] = LeftOut(span.start, stored.nbytes, sha256, tuple(copies))
    ordered = tuple(sorted(parts.values(), key=lambda part: part.start))
    if len(content) - sum(part.size for part in ordered) > most:
        return None
    rest = b"".join(content[start:end] for start, end in _retained(ordered, len(content)))
    return Frame(len(content), tuple(path.name for path in paths), ordered, rest)


def _memories(compiled: CompiledModel) -> list[Array]:
    """The blocks of memory, u8[N], in which the weights of a model are stored."""
    import torch

    storages = {}
    for name in compiled.module:
        for tensor in compiled.module[name].weights.values():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
    return [torch.empty(0, dtype=torch.uint8).set_(s).numpy() for s in storages.values()]


def _copies(
    origins: Origins, array: Array, pairs: Sequence[tuple[Array, Array]] | None
) -> list[StridedCopy] | None:
    """The copies from files that make the bytes of an array; `pairs` are those from memory."""
    if pairs is None:
        if not array.flags.c_contiguous:
            return None
        pairs = [(array, array)]
    return origins.copies(int(array.ctypes.data), pairs)


def _retained(parts: Sequence[LeftOut], size: int) -> list[tuple[int, int]]:
    """The pieces (start, end) of a file that are not left out."""
    starts = [0, *(part.start + part.size for part in parts)]
    return list(zip(starts, [*(part.start for part in parts), size], strict=True))


def complete(frame: Frame, folder: Path, output: Path) -> bool:
    """Write the file of a frame to `output`, with the parts from the checkpoint in `folder`.
    Returns whether each has its hash; `output` is incomplete where one has not.

    Raises OSError where writing fails.
    """
    try:
        sources = [_mapped(folder / name) for name in frame.files]
    except (OSError, ValueError):  # a file is gone or empty
        return False
    content = memoryview(frame.content)
    with output.open("xb") as file:
        file.truncate(frame.size)
        for start, end in _retained(frame.parts, frame.size):
            file.seek(start)
            file.write(content[: end - start])
            content = content[end - start :]

    def write(part: LeftOut) -> bool:
        try:
            piece = copied(part.size, part.copies, sources)
        except (ValueError, IndexError):  # a file is shorter now
            return False
        with open(output, "r+b", buffering=0) as file:
            file.seek(part.start)
            return write_hashed(file, piece)[0] == part.sha256

    return all(on_all_cores(write, frame.parts, [part.size for part in frame.parts]))


def encode(frame: Frame) -> bytes:
    return msgspec.msgpack.encode(frame)


def decode(content: bytes) -> Frame | None:
    """The frame that was encoded; None for other bytes."""
    try:
        frame = msgspec.msgpack.decode(content, type=Frame)
    except msgspec.MsgspecError:
        return None
    pieces = [end - start for start, end in _retained(frame.parts, frame.size)]
    return frame if min(pieces) >= 0 and sum(pieces) == len(frame.content) else None


def _mapped(path: Path) -> memoryview:
    """The content of a file that is not empty."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
