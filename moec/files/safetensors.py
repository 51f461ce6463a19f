"""The headers of safetensors files, checked, before anything of the tensors is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.errors import CaptureError
from moec.files.os_errors import reason
from moec.files.regular_file import check_link, open_regular, read_regular

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """A tensor of a file: its dtype as safetensors spells it, and its bytes [start, end)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder: model.safetensors, those of the index, or the
    only file, whatever its name."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        names = json.loads(read_regular(folder / INDEX))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return sorted(folder.glob("*.safetensors"))


def read_entries(files: list[Path]) -> dict[str, TensorHeader]:
    """The tensors of all files by name.

    Raises CaptureError, naming the file, where a header is damaged, a tensor does not have the
    bytes of its shape, or two files hold a tensor of one name; UsageError for a link out of the
    folder.
    """
    entries: dict[str, TensorHeader] = {}
    for path in files:
        check_link(path)
        for name, entry in _entries(path).items():
            if name in entries:
                raise CaptureError(f"{path} and {entries[name].path.name} both hold {name!r}")
            entries[name] = entry
    return entries


def read_header(path: Path) -> tuple[int, Mapping[str, Any]]:
    """The offset of the data of a file, and what its header says of each tensor.

    Raises CaptureError where the file cannot be read or its tensors do not fill it, each beginning
    where the one before ends.
    """
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size) if size < _LONGEST_HEADER else b"")
        length = path.stat().st_size
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        ranges = sorted(tensor["data_offsets"] for tensor in tensors.values())
        ends = [0, *(end for _, end in ranges)]
        fits = [start for start, _ in ranges] == ends[:-1] and 8 + size + ends[-1] == length
    except OSError as error:
        raise CaptureError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        fits = False
    if not fits:
        raise CaptureError(
            f"{path} is truncated or damaged: copy it again from the source of the checkpoint"
        )
    return 8 + size, tensors


def _entries(path: Path) -> dict[str, TensorHeader]:
    data, tensors = read_header(path)
    entries = {}
    for name, tensor in tensors.items():
        if not name.isprintable():
            raise CaptureError(f"{path} names a tensor {name[:40]!r}, which is no name")
        try:
            shape, (start, end) = tuple(tensor["shape"]), tensor["data_offsets"]
            bits = BITS.get(tensor["dtype"])
            sizes = (*shape, start, end)
            sizes_fit = all(type(size) is int and size >= 0 for size in sizes) and start <= end
        except (ValueError, LookupError, TypeError):
            sizes_fit, bits = False, 8
        if sizes_fit and bits is None:
            raise CaptureError(f"{path}: {name} is of dtype {tensor['dtype']!r}, unknown to moec")
        if not sizes_fit or math.prod(shape) * (bits or 8) != (end - start) * 8:
            raise CaptureError(
                f"{path}: the tensor {name} does not have the bytes of its shape: copy the file "
                "again from the source of the checkpoint"
            )
        entries[name] = TensorHeader(path, tensor["dtype"], shape, data + start, data + end)
    return entries
