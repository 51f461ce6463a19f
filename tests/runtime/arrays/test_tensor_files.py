"""Tensors in files: reading, writing, and the message for each mistake."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moec.errors import InputError, UsageError
from moec.runtime.arrays import tensor_files
from moec.runtime.arrays.tensor_files import read_tensors, write_tensors
from moec.runtime.package import Port

X, LOW = Port("x", "f32", ("T",)), Port("low", "bf16", ("T",))


def arrays() -> dict[str, Any]:
    return {"x": np.arange(3, dtype=np.float32), "low": np.arange(3).astype(ml_dtypes.bfloat16)}


def test_safetensors_keep_every_dtype(tmp_path: Path) -> None:
    write_tensors(path := tmp_path / "a.safetensors", arrays())
    result = read_tensors(path, (X, LOW))
    for name, array in arrays().items():
        assert result[name].dtype == array.dtype
        np.testing.assert_array_equal(result[name], array)


def test_npz_widens_bf16_when_written(tmp_path: Path) -> None:
    write_tensors(path := tmp_path / "a.npz", arrays())
    result = read_tensors(path, (X,))
    assert result["low"].dtype == np.float32
    np.testing.assert_array_equal(result["low"], [0, 1, 2])


def test_npz_with_raw_bf16_is_read_as_the_model_expects(tmp_path: Path) -> None:
    np.savez(path := tmp_path / "a.npz", **arrays())
    result = read_tensors(path, (X, LOW))
    assert result["low"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result["low"], arrays()["low"])


def test_npy_is_for_the_only_input(tmp_path: Path) -> None:
    write_tensors(path := tmp_path / "a.npy", {"y": arrays()["x"]})
    np.testing.assert_array_equal(read_tensors(path, (X,))["x"], arrays()["x"])
    with pytest.raises(
        InputError, match=r"takes 2 inputs: save them as \.npz with the names x, low"
    ):
        read_tensors(path, (X, LOW))
    with pytest.raises(UsageError, match=r"a \.npy file has one array, and there are 2; use \.npz"):
        write_tensors(path, arrays())


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_tensors(tmp_path / "none.npz", (X,))
    with pytest.raises(
        UsageError, match=r"the file type must be one of \.npz, \.npy, \.safetensors"
    ):
        read_tensors(tmp_path / "a.pt", (X,))
    for suffix in tensor_files.SUFFIXES:
        for content in (b"", b"nonsense" * 9, b"PK\3\4", b"\x93NUMPY\1\0"):
            (path := tmp_path / f"bad{suffix}").write_bytes(content)
            with pytest.raises(InputError, match=f"cannot be read as {suffix}"):
                read_tensors(path, (X,))


def test_a_file_with_the_other_suffix(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=arrays()["x"])
    (tmp_path / "a.npz").rename(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", arrays()["x"])
    (tmp_path / "c.npy").rename(tmp_path / "d.npz")
    for name in ("b.npy", "d.npz"):
        with pytest.raises(InputError, match="is not the one of its file name"):
            read_tensors(tmp_path / name, (X,))


def test_nothing_pickled_is_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    for name in ("a.npy", "a.npz"):
        save: Any = np.save if name == "a.npy" else np.savez
        save(tmp_path / name, np.array([Trap()], dtype=object))
        with pytest.raises(InputError, match="cannot be read"):
            read_tensors(tmp_path / name, (X,))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.safetensors"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path := tmp_path / name).write_text("old")

    def full(file: Any, suffix: str, arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "write_arrays", full)
    with pytest.raises(UsageError, match="cannot be written: the disk is full"):
        write_tensors(path, {"x": arrays()["x"]})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [name]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: there is no such file or folder"):
        write_tensors(tmp_path / "none" / "a.npz", arrays())
