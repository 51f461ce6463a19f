"""numpy's files: they are read as by numpy, and anything else is refused with a message."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moec.runtime.arrays.tensor_files import read_npy, read_npz

NUMBERS = st.sampled_from(["?", "<i1", "<i8", ">i4", "<u2", "<f2", "<f4", ">f8", "<c8"])


def npy(array: Any) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def headed(header: str, content: bytes = bytes(4), version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + content


def zipped(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            with archive.open(zipfile.ZipInfo(name), "w") as file:
                file.write(content)
    return path


@given(st.data(), NUMBERS)
def test_as_numpy(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str
) -> None:
    array = data.draw(arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0)))
    folder = tmp_path_factory.mktemp("npy")
    (path := folder / "a.npy").write_bytes(npy(array))
    read = read_npy(path)
    assert (read.dtype, read.shape) == (array.dtype.newbyteorder("="), array.shape)
    np.testing.assert_array_equal(read, array)
    np.savez_compressed(folder / "b.npz", x=array, y=array.T)
    both = read_npz(folder / "b.npz")
    np.testing.assert_array_equal(both["x"], array)
    np.testing.assert_array_equal(both["y"], array.T)
    assert both["x"].flags.writeable


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{'descr':'<f4','fortran_order':False,'shape':(10**12,)}", "is not a dict"),
        (
            "{'descr':'<f4','fortran_order':False,'shape':(9" + "9" * 14 + ",)}",
            "its shape is (9999",
        ),
        ("{'descr':'<f4','fortran_order':False,'shape':(7,)}", "takes 28 bytes, and it holds 4"),
        ("{'descr':'<f4','fortran_order':False,'shape':(True,)}", "its shape is (True,)"),
        ("{'descr':'<f4','fortran_order':False,'shape':(-1,)}", "its shape is (-1,)"),
        ("{'descr':'<f4','fortran_order':0,'shape':(1,)}", "its fortran_order is 0"),
        ("{'descr':'<f4','fortran_order':False,'shape':" + "(1," + "1," * 40 + ")}", "41 axes"),
        ("{'descr':',,','fortran_order':False,'shape':(1,)}", "it holds ,,, not plain"),
        ("{'descr':('<f4',),'fortran_order':False,'shape':(1,)}", "it holds ('<f4',), not plain"),
        ("{'descr':'|O','fortran_order':False,'shape':(1,)}", "it holds |O, not plain"),
        ("{'descr':'|V0','fortran_order':False,'shape':(1,)}", "it holds |V0, not plain"),
        ("{'descr':__import__('os'),'fortran_order':False,'shape':(1,)}", "is not a dict"),
        ("(" * 900, "is not a dict"),
        ("-" * 900 + "1", "is not a dict"),
        ("(" * 3000, "its header has 3000 bytes"),
        ("{1:2}", "is not a dict"),
    ],
)
def test_headers(tmp_path: Path, header: str, words: str) -> None:
    (path := tmp_path / "a.npy").write_bytes(headed(header))
    with pytest.raises(ValueError, match=re.escape(words)):
        read_npy(path)


def test_versions(tmp_path: Path) -> None:
    header = "{'descr':'<f4','fortran_order':False,'shape':(1,)}"
    for version in (1, 2, 3):
        (path := tmp_path / "a.npy").write_bytes(headed(header, version=version))
        assert read_npy(path).tolist() == [0]
    path.write_bytes(headed(header, version=4))
    with pytest.raises(ValueError, match="its version is 4"):
        read_npy(path)


def test_members(tmp_path: Path) -> None:
    content = npy(np.float32([1]))
    for members, words in (
        ([("x.npy", b"text")], "it is not an array of numpy"),
        ([(".npy", content)], "an array in it has no name"),
        ([("x.npy", content), ("x", content)], "it holds 'x' twice"),
        ([("x.npy", content[:-1])], "takes 4 bytes, and it holds 3"),
    ):
        with pytest.raises(ValueError, match=words):
            read_npz(zipped(tmp_path / "a.npz", members))
    zipped(tmp_path / "b.npz", [("x.npy", content)], zipfile.ZIP_BZIP2)
    content = (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "b.npz") as archive:
        (member,) = archive.infolist()
    at = content.index(b"PK\1\2") + 10
    assert member.compress_type == zipfile.ZIP_STORED  # ZipInfo's own method
    (tmp_path / "b.npz").write_bytes(content[:at] + b"\x0c\0" + content[at + 2 :])
    with pytest.raises(ValueError, match="is encrypted, or compressed by another method"):
        read_npz(tmp_path / "b.npz")
