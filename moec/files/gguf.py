"""The header of a GGUF file, checked: every length is compared with the bytes that are left.

magic "GGUF", version u32, tensors u64, fields u64
field:   key string, type u32, value       string: length u64, UTF-8       array: type, length
tensor:  name string, dimensions u32, sizes u64.., type u32, offset u64    data, aligned
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.errors import CaptureError
from moec.files.os_errors import reason
from moec.files.regular_file import check_link, open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
MOST_SPLITS = 1000
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9
BLOCKS = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136),
    "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17),
}  # fmt: skip
"""The types of tensors that moec reads: number, weights of a block, bytes of a block."""
_TYPES = {number: (name, size, length) for name, (number, size, length) in BLOCKS.items()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: its type, its sizes with the rows last, and where its bytes start."""

    path: Path
    type: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class GgufHeader:
    """The fields and the tensors of a file, or of all files of a split model."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    files: tuple[Path, ...] = field(default=())


class _Damaged(Exception):
    """What is wrong with a file."""


@dataclass
class _Cursor:
    """Reads values from a mapped file, never past its end."""

    data: mmap.mmap
    at: int = 0

    def scalar(self, form: str) -> Any:
        size = struct.calcsize(form)
        if self.at + size > len(self.data):
            raise _Damaged("it ends inside its header")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        if length > len(self.data) - self.at:
            raise _Damaged(f"a string of {length:,} bytes passes its end")
        text = self.data[self.at : self.at + length]
        self.at += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _Damaged("a string is no UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise _Damaged(f"a field has the type {kind}, which does not exist")
        return self.scalar(SCALARS[kind])

    def array(self) -> list[Any]:
        kind, length = self.scalar("<I"), self.scalar("<Q")
        if kind != STRING and kind not in SCALARS:
            raise _Damaged(f"an array has elements of type {kind}")
        least = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
        if length > (len(self.data) - self.at) // least:
            raise _Damaged(f"an array of {length:,} elements passes its end")
        if kind == STRING:
            return [self.string() for _ in range(length)]
        form = f"<{length}{SCALARS[kind][1:]}"
        values = list(struct.unpack_from(form, self.data, self.at))
        self.at += struct.calcsize(form)
        return values


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do; a file that cannot be read does not."""
    try:
        with open_regular(path) as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufHeader:
    """The header of a model, with the tensors of all files of a split one.

    Raises CaptureError, naming the file, where one is damaged or missing.
    """
    first = _header(path)
    count = first.fields.get("split.count", 1)
    if type(count) is not int or not 1 <= count <= MOST_SPLITS:
        raise CaptureError(f"{path} says that it is one of {count!r} files")
    if count == 1:
        return first
    number = f"-00001-of-{count:05}"
    stem, ending, _ = path.stem.rpartition(number)
    if not ending or repr(first.fields.get("split.no")) != "0":
        raise CaptureError(
            f"{path} is part of a model in {count} files: give the first, *{number}.gguf"
        )
    tensors, files = dict(first.tensors), [path]
    for part in range(1, count):
        other = path.with_name(f"{stem}-{part + 1:05}-of-{count:05}{path.suffix}")
        check_link(other)
        header = _header(other)
        numbers = header.fields.get("split.no"), header.fields.get("split.count")
        if repr(numbers) != repr((part, count)):  # 1.0 and True equal 1
            raise CaptureError(f"{other} is not part {part + 1} of {count}, as its name says")
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CaptureError(f"{other} and {tensors[name].path.name} both hold {name}")
            tensors[name] = tensor
        files.append(other)
    return GgufHeader(first.fields, tensors, tuple(files))


def _header(path: Path) -> GgufHeader:
    try:
        with (
            open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _parse(path, _Cursor(data))
    except OSError as error:
        raise CaptureError(f"{path} cannot be read: {reason(error)}") from None
    except (_Damaged, ValueError) as error:
        raise CaptureError(
            f"{path} is truncated or damaged: {error}; copy it again from the source of the model"
        ) from None


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    if cursor.data[:4] != MAGIC:
        raise _Damaged("it does not start with GGUF")
    cursor.at = 4
    version = cursor.scalar("<I")
    if version not in VERSIONS:
        raise _Damaged(f"its version is {version}; moec reads 2 and 3")
    count, fields_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    if max(count, fields_count) > len(cursor.data) // 12:
        raise _Damaged(f"{count:,} tensors and {fields_count:,} fields pass its end")
    fields: dict[str, Any] = {}
    for _ in range(fields_count):
        name = cursor.string()
        if name in fields:
            raise _Damaged(f"it has the field {name} twice")
        fields[name] = cursor.value(cursor.scalar("<I"))
    entries = [_entry(cursor) for _ in range(count)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment % 8 or alignment > 1 << 20:
        raise _Damaged(f"its alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for name, kind, shape, offset in entries:
        if kind not in _TYPES:
            raise CaptureError(
                f"{path}: {name} has the type {kind}; moec reads {', '.join(BLOCKS)}"
            )
        label, block, size = _TYPES[kind]
        if not shape or 0 in shape or shape[-1] % block:
            raise _Damaged(f"the rows of {name} are no blocks of {block}")
        length = math.prod(shape) // block * size
        if offset != end:
            raise _Damaged(f"the tensor {name} does not begin where the one before it ends")
        end = offset + -(-length // alignment) * alignment
        if start + offset + length > len(cursor.data):
            raise _Damaged(f"the tensor {name} passes its end")
        if name in tensors:
            raise _Damaged(f"it holds {name} twice")
        tensors[name] = GgufTensor(path, label, shape, start + offset, length)
    if (more := len(cursor.data) - start - end) > 0:
        raise _Damaged(f"it holds more after its last tensor (bytes: {more:,})")
    return GgufHeader(fields, tensors, (path,))


def _entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, dimensions = cursor.string(), cursor.scalar("<I")
    if not name.isprintable():
        raise _Damaged(f"it names a tensor {name[:40]!r}, which is no name")
    if dimensions > MOST_DIMENSIONS:
        raise _Damaged(f"{name} has {dimensions} dimensions")
    sizes = [cursor.scalar("<Q") for _ in range(dimensions)]
    return name, cursor.scalar("<I"), tuple(reversed(sizes)), cursor.scalar("<Q")
