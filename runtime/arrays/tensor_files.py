"""Tensors in files: .npz, .npy and .safetensors, read for a model's inputs, written from outputs.

numpy's formats have no bf16. An array of ml_dtypes.bfloat16 is saved as raw two-byte elements,
which are read as bf16 where the model expects bf16; bf16 outputs are written as float32. Pickles
are never read.
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

from moec.errors import InputError, SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.regular_file import open_regular, whole_file
from moec.runtime.checks import free_memory
from moec.runtime.dtypes import NUMPY, Array
from moec.runtime.package import Port
from moec.spelling import did_you_mean_file

# A strict reader of numpy's .npy and .npz: numbers only, exactly as many as the header declares.
#
# The format is that of `numpy.lib.format`: a magic number, a version, and the literal of a dict
# with dtype, order of the axes and shape. numpy's own reader can unpickle, accepts dtypes that no
# model takes, and reports errors by a dozen kinds of exceptions.

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


SUFFIXES = (".npz", ".npy", ".safetensors")
_RAW = np.dtype("V2")


def read_tensors(path: Path, ports: tuple[Port, ...]) -> dict[str, Array]:
    """The arrays in the file by name; a .npy, with one array, requires a model with one input.

    Raises InputError where the file is missing, damaged, or not of one of the three formats.
    """
    check_suffix(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file{did_you_mean_file(path)}")
    try:
        arrays = _read(path)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        line = reason(error) if isinstance(error, OSError) else lines[0]
        raise InputError(f"{path} cannot be read as {path.suffix}: {line}") from error
    if path.suffix == ".npy":
        if len(ports) != 1:
            names = ", ".join(port.name for port in ports)
            raise InputError(
                f"{path} has one array without a name, and the model takes {len(ports)} inputs: "
                f"save them as .npz with the names {names}"
            )
        arrays = {ports[0].name: arrays[""]}
    bf16 = {port.name for port in ports if port.dtype == "bf16"}
    return {
        name: array.view(NUMPY["bf16"]) if name in bf16 and array.dtype == _RAW else array
        for name, array in arrays.items()
    }


def _read(path: Path) -> dict[str, Array]:
    with open_regular(path) as file:
        zipped = file.read(2) == b"PK"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if zipped is (path.suffix == ".npy"):
        raise ValueError("its format is not the one of its file name")
    return read_npz(path) if zipped else {"": read_npy(path)}


def write_tensors(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write the arrays to a file, which appears complete or not at all.

    Raises UsageError where the path cannot be written or the format cannot hold them.
    """
    check_suffix(path)
    if path.suffix == ".npy" and len(arrays) != 1:
        raise UsageError(
            f"{path}: a .npy file has one array, and there are {len(arrays)}; use .npz"
        )
    try:
        with whole_file(path) as file:
            write_arrays(file, path.suffix, arrays)
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {reason(error)}") from error


def write_arrays(file: Any, suffix: str, arrays: Mapping[str, Array]) -> None:
    if suffix == ".safetensors":
        from safetensors.numpy import save

        file.write(save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))
        return
    wide = {
        name: a.astype(np.float32) if a.dtype == NUMPY["bf16"] else a for name, a in arrays.items()
    }
    if suffix == ".npz":
        np.savez(file, **wide)  # type: ignore[arg-type]
    else:
        np.save(file, next(iter(wide.values())), allow_pickle=False)


def check_suffix(path: Path) -> None:
    """Raise UsageError unless the file has the suffix of one of the three formats."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: the file type must be one of {', '.join(SUFFIXES)}")
