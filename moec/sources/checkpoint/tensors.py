"""The tensors of safetensors files, mapped: a tensor costs memory when its values are read."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moec.files.regular_file import open_regular
from moec.files.safetensors import TensorHeader, read_entries, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, as the files hold them."""

    entries: Mapping[str, TensorHeader]
    maps: Mapping[Path, mmap.mmap]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entries[name].dtype]

    def read(self, name: str) -> Tensor:
        """The tensor, as a view of its file; writing to it does not change the file."""
        entry = self.entries[name]
        dtype, length = DTYPES[entry.dtype], entry.end - entry.start
        if not length:
            return torch.empty(entry.shape, dtype=dtype)
        data = self.maps[entry.path]
        if entry.start % dtype.itemsize:  # older writers did not align tensors
            aligned = bytearray(data[entry.start : entry.end])
            return torch.frombuffer(aligned, dtype=dtype).view(entry.shape)
        flat = torch.frombuffer(
            data, dtype=dtype, count=length // dtype.itemsize, offset=entry.start
        )
        return flat.view(entry.shape)


def map_folder(folder: Path) -> Tensors:
    """The tensors of a folder's weights. Raises CaptureError where a file is damaged."""
    return map_files(weight_files(folder))


def map_files(files: Iterable[Path]) -> Tensors:
    entries = read_entries(list(files))
    return Tensors(entries, {path: mapped(path) for path in {e.path for e in entries.values()}})


def mapped(path: Path) -> mmap.mmap:
    """The file, mapped so that writes stay in this process."""
    with open_regular(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
