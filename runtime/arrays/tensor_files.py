"""Tensors in files: .npz, .npy and .safetensors, read for a model's inputs, written from outputs.

numpy's formats have no bf16. An array of ml_dtypes.bfloat16 is saved as raw two-byte elements,
which are read as bf16 where the model expects bf16; bf16 outputs are written as float32. Pickles
are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import InputError, UsageError
from moec.files.os_errors import reason
from moec.files.regular_file import open_regular
from moec.files.whole_file import whole_file
from moec.runtime.arrays.numpy_files import read_npy, read_npz
from moec.runtime.dtypes import NUMPY, Array
from moec.runtime.package import Port
from moec.spelling import did_you_mean_file

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
        raise UsageError(f"{path} cannot be written: {reason(error)}") from error


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
