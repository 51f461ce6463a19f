"""Written artifacts can be read back, and are never written in part."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.errors import UsageError
from moec.runtime.artifact import artifact, part_writers
from moec.runtime.call import executor
from moec.runtime.package import Package, Port
from tests.runtime import toy
from tests.runtime.damaged import same, unpacked


@pytest.mark.parametrize("folder", [False, True])
def test_reads_back_what_was_written(package: Package, tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "model.moec"
    files = {"tokenizer/tokenizer.json": b"{}"}
    artifact.write(
        package,
        path,
        graphs={"main": toy.GRAPH},
        samples=[toy.sample(package), toy.sample(package, rows=0)],
        tolerance=1e-4,
        extra={"passes": ["fuse-gate"], "blocks": 1},
        files=files,
        folder=folder,
    )
    read = artifact.read(path)
    assert path.is_dir() is folder
    assert read.graphs["main"] == toy.GRAPH
    assert read.files == files
    assert read.manifest.tolerance == 1e-4
    assert read.manifest.extra == {"passes": ["fuse-gate"], "blocks": 1}
    assert {"moec", "tvm"} <= read.package.versions.keys()
    plain = {"arrays": {}, "library": b"", "versions": {}}
    assert replace(read.package, **plain) == replace(package, **plain)
    assert read.package.library == package.library
    same(read.package.arrays, package.arrays)
    for sample, rows in zip(read.samples, (3, 0), strict=True):
        same(sample.inputs, toy.sample(package, rows).inputs)
        same(sample.outputs, toy.sample(package, rows).outputs)


def test_weights_are_mapped_and_not_copied(saved: Path) -> None:
    arrays = artifact.read(saved).package.arrays
    for array in arrays.values():
        assert not array.flags.owndata
        assert array.ctypes.data % part_writers.PAGE == 0
    arrays["b"][0] = 77  # the mapping is private: neither the file nor another reader sees it
    assert artifact.read(saved).package.arrays["b"][0] != 77


def test_the_same_model_gives_the_same_bytes(package: Package, saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.moec"
    artifact.write(
        package, again, graphs={"main": toy.GRAPH}, samples=[toy.sample(package)], tolerance=1e-5
    )
    assert again.read_bytes() == saved.read_bytes()


def test_parts_whose_sizes_have_64_bits(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writers, "ZIP64_BYTES", 10)
    monkeypatch.setattr(part_writers, "BLOCK_BYTES", 7)
    artifact.write(package, path := tmp_path / "model.moec", graphs={"main": toy.GRAPH})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    read = artifact.read(path).package.arrays
    same(read, package.arrays)
    assert all(array.ctypes.data % part_writers.PAGE == 0 for array in read.values())


def test_a_folder_unpacked_from_the_file_is_the_same_artifact(saved: Path) -> None:
    folder = unpacked(saved)
    model = executor.load(folder)
    inputs = toy.inputs()
    np.testing.assert_array_equal(model(inputs)["y"], executor.load(saved)(inputs)["y"])


def test_nothing_is_left_where_writing_fails(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.moec"
    path.write_bytes(old := b"")
    write_hashed = part_writers.write_hashed

    def full(file: Any, content: Any) -> tuple[str, int]:
        if content == bytes(package.arrays["b"]):
            raise OSError(28, "No space left on device")
        return write_hashed(file, content)

    monkeypatch.setattr(part_writers, "write_hashed", full)
    with pytest.raises(UsageError, match="cannot be written: the disk is full"):
        artifact.write(package, path, graphs={"main": toy.GRAPH})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["model.moec"]


def test_overwrites_artifacts_and_nothing_else(package: Package, saved: Path) -> None:
    folder = unpacked(saved)
    for path in (saved, folder):
        artifact.write(package, path, graphs={"main": "new"})
        assert artifact.read(path).graphs["main"] == "new"
    artifact.write(package, folder, graphs={"main": "file"}, folder=False)
    assert folder.is_file()
    artifact.write(package, folder, graphs={"main": "folder"}, folder=True)
    assert artifact.read(folder).graphs["main"] == "folder"

    saved.write_bytes(saved.read_bytes()[:100])  # damaged: compiling anew is the remedy
    artifact.write(package, saved, graphs={"main": "mended"})
    assert artifact.read(saved).graphs["main"] == "mended"

    other = saved.with_name("notes.txt")
    other.write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a moec artifact"):
        artifact.write(package, other, graphs={"main": "new"})
    assert other.read_text() == "mine"
    with pytest.raises(UsageError, match="exists and is not a moec artifact"):
        artifact.write(package, saved.parent, graphs={"main": "new"})
    assert sorted(os.listdir(saved.parent)) == ["notes.txt", folder.name, saved.name]


def test_a_folder_that_is_not_there_to_write_to(package: Package, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: there is no such file or folder"):
        artifact.write(package, tmp_path / "none" / "model.moec", graphs={"main": ""})


def test_a_written_file_has_ordinary_permissions(saved: Path, package: Package) -> None:
    path = saved.with_name("new.moec")
    artifact.write(package, path, graphs={"main": ""})
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_arrays_that_no_port_reads_are_not_stored(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    arrays = {**package.arrays, "spare": np.zeros(1000)}
    artifact.write(replace(package, arrays=arrays), path, graphs={"main": ""})
    assert "spare" not in artifact.read(path).package.arrays


def test_empty_and_strided_arrays(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    arrays = {**package.arrays, "none": np.zeros((0, 3)), "turned": np.arange(6.0).reshape(2, 3).T}
    more = (Port("none", "f64", (0, 3)), Port("turned", "f64", (3, 2)))
    main = replace(package.main, params=(*package.main.params, *more))
    changed = replace(package, arrays=arrays, functions={"main": main})
    artifact.write(changed, path, graphs={"main": ""})
    same(artifact.read(path).package.arrays, arrays)


def test_the_private_copy_of_the_code_is_gone_after_loading(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    executor.load(saved)
    assert os.listdir(folder) == []
    shutil.rmtree(folder)
