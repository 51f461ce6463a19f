"""A strict reader of numpy's .npy and .npz: numbers only, exactly as many as the header declares.

The format is that of `numpy.lib.format`: a magic number, a version, and the literal of a dict with
dtype, order of the axes and shape. numpy's own reader can unpickle, accepts dtypes that no model
takes, and reports errors by a dozen kinds of exceptions.
"""

from __future__ import annotations

import ast
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from moec.runtime.checks import free_memory
from moec.runtime.dtypes import Array

_MAGIC = b"\x93NUMPY"
_LONGEST = 1000  # characters of a header, which also limits the nesting of an untrusted one
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(8|16)|V2)")  # V2: bf16, see tensor_files
_KEYS = {"descr", "fortran_order", "shape"}
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_npy(path: Path) -> Array:
    """The array in a .npy. Raises ValueError with the reason for any other content."""
    with path.open("rb") as file:
        return _array(file, path.stat().st_size)


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays in a .npz, by name. Raises ValueError as `read_npy`."""
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if not name:
                    raise ValueError("an array in it has no name")
                if name in arrays:
                    raise ValueError(f"it holds {name!r} twice")
                if member.compress_type not in _METHODS or member.flag_bits & 1:
                    raise ValueError(f"{name!r} is encrypted, or compressed by another method")
                with archive.open(member) as file:
                    arrays[name] = _array(file, member.file_size)
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
        *(RuntimeError, NotImplementedError, OverflowError),
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return arrays


def _array(file: IO[bytes], size: int) -> Array:
    """The one array in a file of `size` bytes."""
    start = file.read(8)
    if start[:6] != _MAGIC or len(start) < 8:
        raise ValueError("it is not an array of numpy: its first bytes differ")
    width = 2 if start[6] == 1 else 4
    if start[6] not in (1, 2, 3):
        raise ValueError(f"its version is {start[6]}, and the format has 1 to 3")
    length = int.from_bytes(file.read(width), "little")
    if length > _LONGEST:
        raise ValueError(f"its header has {length} bytes, too many for an array of numbers")
    header = _header(file.read(length))
    dtype, shape = _dtype(header["descr"]), _shape(header["shape"])
    nbytes = dtype.itemsize * math.prod(shape)
    if (rest := size - 8 - width - length) != nbytes:
        raise ValueError(
            f"{header['descr']}{list(shape)} takes {nbytes} bytes, and it holds {max(0, rest)}"
        )
    if nbytes > (free := free_memory()):
        raise ValueError(f"it takes {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    flat = np.empty(math.prod(shape), dtype)
    if file.readinto(flat.view(np.uint8)) != nbytes:  # type: ignore[attr-defined]
        raise ValueError("it is truncated")
    flat = flat.astype(dtype.newbyteorder("="), copy=False)
    if header["fortran_order"] is True:
        return flat.reshape(shape[::-1]).T
    return flat.reshape(shape)


def _header(content: bytes) -> Mapping[str, Any]:
    try:
        header = ast.literal_eval(content.decode())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("its header is not a dict of numpy") from error
    if not isinstance(header, dict) or header.keys() != _KEYS:
        raise ValueError("its header is not a dict of numpy")
    if not isinstance(header["fortran_order"], bool):
        raise ValueError(f"its fortran_order is {header['fortran_order']!r}")
    return header


def _dtype(name: object) -> np.dtype[Any]:
    if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
        raise ValueError(f"it holds {str(name)[:80]}, not plain numbers")
    return np.dtype(name)


def _shape(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"its shape is {str(shape)[:80]}")
    if len(shape) > 32:
        raise ValueError(f"it has {len(shape)} axes, and an array has 32 at most")
    return shape
