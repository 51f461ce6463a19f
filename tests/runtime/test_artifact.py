"""What is written comes back; what is damaged, foreign or forged is refused in one sentence."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.errors import ArtifactError, UsageError
from moec.runtime import artifact, container, executor, manifest
from moec.runtime.package import CpuNeeds, Package, Port
from tests.runtime import toy


def refused(path: Path) -> str:
    """The words that refuse the artifact, whether it is looked at or loaded."""
    with pytest.raises(ArtifactError) as caught:
        executor.load(path)
    words = str(caught.value)
    assert "\n" not in words
    assert str(path) in words
    return words


def unpacked(path: Path) -> Path:
    folder = path.with_suffix(".folder")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and sign it anew, as somebody who forges one would."""
    path = folder / "manifest.json"
    text = json.loads(path.read_bytes())
    change(text)
    body = {key: value for key, value in text.items() if key not in ("moec", "sha256")}
    text["sha256"] = manifest._digest(text["moec"], body)
    path.write_text(json.dumps(text))


def edit_package(folder: Path, **changes: Any) -> None:
    edit_manifest(folder, lambda text: text["package"].update(changes))


def add_member(path: Path, name: str, **how: Any) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x" * 100, **how)


@pytest.mark.parametrize("folder", [False, True])
def test_reads_back_what_was_written(package: Package, tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "model.moec"
    files = {"tokenizer/tokenizer.json": b"{}"}
    artifact.write(
        package,
        path,
        graph_text=toy.GRAPH,
        samples=[toy.sample(package), toy.sample(package, rows=0)],
        tolerance=1e-4,
        extra={"passes": ["fuse-gate"], "blocks": 1},
        files=files,
        folder=folder,
    )
    read = artifact.read(path)
    assert path.is_dir() is folder
    assert read.graph_text == toy.GRAPH
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


def same(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_weights_are_mapped_and_not_copied(saved: Path) -> None:
    arrays = artifact.read(saved).package.arrays
    for array in arrays.values():
        assert not array.flags.owndata
        assert array.ctypes.data % container.PAGE == 0
    arrays["b"][0] = 77  # the mapping is private: neither the file nor another reader sees it
    assert artifact.read(saved).package.arrays["b"][0] != 77


def test_the_same_model_gives_the_same_bytes(package: Package, saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.moec"
    artifact.write(
        package, again, graph_text=toy.GRAPH, samples=[toy.sample(package)], tolerance=1e-5
    )
    assert again.read_bytes() == saved.read_bytes()


def test_a_folder_unpacked_from_the_file_is_the_same_artifact(saved: Path) -> None:
    folder = unpacked(saved)
    model = executor.load(folder)
    given = toy.inputs()
    np.testing.assert_array_equal(model(given)["y"], executor.load(saved)(given)["y"])


def test_missing(tmp_path: Path) -> None:
    assert "there is no such file" in refused(tmp_path / "none.moec")


@pytest.mark.parametrize("content", [b"", b"x", b"PK", b"PK\3\4", b"\x7fELF" * 100])
def test_not_an_artifact(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.moec"
    path.write_bytes(content)
    words = refused(path)
    assert "is not a moec artifact" in words or "is truncated or damaged" in words


def test_a_zip_or_folder_without_a_manifest(tmp_path: Path) -> None:
    add_member(tmp_path / "other.zip", "hello.txt")
    assert "holds no manifest.json" in refused(tmp_path / "other.zip")
    assert "holds no manifest.json" in refused(tmp_path)


@pytest.mark.parametrize("part", [0.01, 0.3, 0.9, 0.999])
def test_truncated(saved: Path, part: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * part)])
    assert "is truncated or damaged" in refused(saved)


def test_a_changed_byte_is_found_in_every_part(saved: Path) -> None:
    folder = unpacked(saved)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for at in {0, len(content) // 2, len(content) - 1}:
            changed = bytes([content[at] ^ 1])
            path.write_bytes(content[:at] + changed + content[at + 1 :])
            words = refused(folder)
            if path.name != "manifest.json":
                assert path.relative_to(folder).as_posix() in words
                assert "was altered" in words
        path.write_bytes(content)
    executor.load(folder)


def test_a_changed_byte_anywhere_in_the_file_is_found_or_harmless(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    whole = artifact.read(saved)
    spots = random.Random(0).sample(range(len(content)), 200)
    spots += range(len(content) - 700, len(content))  # the zip directory
    for at in spots:
        content[at] ^= 0xFF
        saved.write_bytes(content)
        content[at] ^= 0xFF
        try:
            read = artifact.read(saved)
            read.verify()
        except ArtifactError:
            continue
        assert read.package.library == whole.package.library
        same(read.package.arrays, whole.package.arrays)


def test_no_array_is_handed_out_unverified(saved: Path) -> None:
    folder = unpacked(saved)
    path = folder / "weights/00007.bin"
    path.write_bytes(bytes(path.stat().st_size))
    arrays = artifact.read(folder).package.arrays
    for name in arrays:
        with pytest.raises(ArtifactError, match=r"weights/00007\.bin was altered"):
            arrays[name]


def test_a_manifest_that_still_reads_but_was_changed(saved: Path) -> None:
    folder = unpacked(saved)
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"tolerance": 1e-05', b'"tolerance": 9e+05'))
    assert "manifest.json was altered: its SHA-256 differs" in refused(folder)


@pytest.mark.parametrize("name", ["graph.moec", "kernels/lib.so", "weights/00007.bin"])
def test_a_missing_or_short_part(saved: Path, name: str) -> None:
    folder = unpacked(saved)
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    words = refused(folder)
    assert f"{name} has {len(content) - 1} bytes where the manifest says {len(content)}" in words
    path.unlink()
    assert f"{name} is missing" in refused(folder)


@pytest.mark.parametrize(("version", "word"), [(0, "older"), (99, "newer")])
def test_another_format_version(saved: Path, version: int, word: str) -> None:
    folder = unpacked(saved)
    edit_manifest(folder, lambda text: text.update(moec=version))
    assert f"has format {version}, which is {word} than the format {manifest.FORMAT}" in refused(
        folder
    )


def test_another_version_of_tvm(saved: Path) -> None:
    folder = unpacked(saved)
    edit_package(folder, versions={"tvm": "0.11.0"})
    words = refused(folder)
    assert "was compiled with TVM 0.11.0, and TVM 0." in words
    assert "install apache-tvm 0.11.0" in words


def test_a_cpu_without_the_features(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    needs = CpuNeeds("future", features=("avx2048",))
    artifact.write(replace(package, target=needs), path, graph_text=toy.GRAPH)
    assert "needs avx2048, which this CPU lacks" in refused(path)


def test_another_machine(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    needs = CpuNeeds("far", mtriple="riscv64-unknown-linux-gnu")
    artifact.write(replace(package, target=needs), path, graph_text=toy.GRAPH)
    assert "was compiled for riscv64" in refused(path)


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (b"print('no')", "is not a library for"),
        (b"\x7fELF\2\1\1" + bytes(11) + b"\xf3\0" + bytes(100), "is not a library for"),
    ],
)
def test_what_is_not_a_library(
    package: Package, tmp_path: Path, library: bytes, words: str
) -> None:
    path = tmp_path / "model.moec"
    artifact.write(replace(package, library=library), path, graph_text=toy.GRAPH)
    assert words in refused(path)


def test_a_library_that_does_not_load(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    assert isinstance(package.library, bytes)
    artifact.write(replace(package, library=package.library[:64]), path, graph_text=toy.GRAPH)
    with pytest.raises(ArtifactError, match="the native code does not load"):
        executor.load(path)


def test_a_library_without_the_model(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    library = toy.language_model_library("other")
    artifact.write(replace(package, library=library), path, graph_text=toy.GRAPH)
    with pytest.raises(ArtifactError, match=r"the native code does not load: .*'main'"):
        executor.load(path)


def test_native_code_may_be_left_out(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    artifact.write(package, path, graph_text=toy.GRAPH, native=False)
    assert artifact.read(path).package.library == b""
    with pytest.raises(ArtifactError, match="holds no native code; run it with --rebuild"):
        executor.load(path)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a//b", "a\\b", "a/./b", "c:evil", ".."])
def test_names_that_lead_elsewhere(saved: Path, name: str) -> None:
    add_member(saved, name)
    assert "is not a name that a part may have" in refused(saved)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members(saved: Path) -> None:
    add_member(saved, "graph.moec")
    assert "holds 'graph.moec' twice" in refused(saved)


def test_compressed_members(saved: Path) -> None:
    add_member(saved, "bomb.bin", compress_type=zipfile.ZIP_DEFLATED)
    assert "is compressed or encrypted, so it cannot be mapped; unpack" in refused(saved)


def test_members_that_overlap(tmp_path: Path) -> None:
    """One member's bytes hold another's header, and the zip directory points to it."""
    path = tmp_path / "model.moec"
    header = struct.pack("<4s22xHH", b"PK\3\4", len("inner"), 0) + b"inner"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("outer", header + b"12345678")
        archive.writestr("inner", b"abcd")
        inner = archive.start_dir + 46 + len("outer")
    content = bytearray(path.read_bytes())
    content[inner + 42 : inner + 46] = struct.pack("<I", 30 + len("outer"))
    path.write_bytes(content)
    assert "'inner' does not lie where the zip directory says" in refused(path)


def test_a_directory_that_points_to_another_member(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        first, at = archive.infolist()[0], archive.start_dir
    second = at + 46 + len(first.filename)
    content[second + 42 : second + 46] = struct.pack("<I", first.header_offset)
    saved.write_bytes(content)
    assert "does not lie where the zip directory says" in refused(saved)


def test_packed_again_by_another_program(saved: Path) -> None:
    """Stored but not aligned: the weights are copied to where kernels can read them."""
    given = toy.inputs()
    y = executor.load(saved)(given)["y"]
    folder = unpacked(saved)
    again = saved.with_name("again.moec")
    with zipfile.ZipFile(again, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    np.testing.assert_array_equal(executor.load(again)(given)["y"], y)


def test_a_folder_never_follows_a_link(saved: Path) -> None:
    folder = unpacked(saved)
    elsewhere = folder.with_name("elsewhere")
    (folder / "graph.moec").rename(elsewhere)
    (folder / "graph.moec").symlink_to(elsewhere)
    assert "graph.moec is missing" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.pop("package"),
        lambda text: text["package"].pop("inputs"),
        lambda text: text["package"]["inputs"][0].update(dtype="f31"),
        lambda text: text["package"]["inputs"][0].update(shape=["__import__('os')"]),
        lambda text: text["package"]["inputs"][0].update(shape=["(" * 400 + "T" + ")" * 400]),
        lambda text: text["package"]["inputs"][0].update(shape=[-1]),
        lambda text: text["package"]["inputs"][0].update(shape=[2.5]),
        lambda text: text["package"].update(sizes={"T": [0]}),
        lambda text: text["package"]["params"][0].update(shape=[4, 4]),
        lambda text: text["package"]["params"][0].update(name="gone"),
        lambda text: text["package"]["states"][0].update(shape=["T"]),
        lambda text: text["arrays"]["w"].update(shape=[4, 300]),
        lambda text: text["arrays"]["w"].update(part="weights/none.bin"),
        lambda text: text["arrays"]["w"].update(dtype=7),
        lambda text: text["parts"].pop("weights/00007.bin"),
        lambda text: text["parts"].pop("graph.moec"),
        lambda text: text.update(samples=[{}]),
    ],
)
def test_a_forged_manifest(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    folder = unpacked(saved)
    edit_manifest(folder, change)
    words = refused(folder)
    assert "malformed" in words or "holds no graph.moec" in words or "is not a size" in words


@pytest.mark.parametrize("text", [b"[1]", b"{}", b"nonsense", b"[" * 200_000, b"\xff\xfe"])
def test_a_manifest_that_is_none(saved: Path, text: bytes) -> None:
    folder = unpacked(saved)
    (folder / "manifest.json").write_bytes(text)
    refused(folder)


def test_nothing_is_left_where_writing_fails(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.moec"
    path.write_bytes(old := b"")
    add = container._ZipWriter.add

    def full(self: Any, name: str, content: Any) -> None:
        if name.startswith("weights"):
            raise OSError(28, "No space left on device")
        add(self, name, content)

    monkeypatch.setattr(container._ZipWriter, "add", full)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        artifact.write(package, path, graph_text=toy.GRAPH)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["model.moec"]


def test_overwrites_artifacts_and_nothing_else(package: Package, saved: Path) -> None:
    folder = unpacked(saved)
    for path in (saved, folder):
        artifact.write(package, path, graph_text="new")
        assert artifact.read(path).graph_text == "new"
    artifact.write(package, folder, graph_text="file", folder=False)
    assert folder.is_file()
    artifact.write(package, folder, graph_text="folder", folder=True)
    assert artifact.read(folder).graph_text == "folder"

    saved.write_bytes(saved.read_bytes()[:100])  # damaged: compiling anew is the remedy
    artifact.write(package, saved, graph_text="mended")
    assert artifact.read(saved).graph_text == "mended"

    other = saved.with_name("notes.txt")
    other.write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a moec artifact"):
        artifact.write(package, other, graph_text="new")
    assert other.read_text() == "mine"
    with pytest.raises(UsageError, match="exists and is not a moec artifact"):
        artifact.write(package, saved.parent, graph_text="new")
    assert sorted(os.listdir(saved.parent)) == ["notes.txt", folder.name, saved.name]


def test_a_folder_that_is_not_there_to_write_to(package: Package, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        artifact.write(package, tmp_path / "none" / "model.moec", graph_text="")


def test_a_written_file_has_ordinary_permissions(saved: Path, package: Package) -> None:
    path = saved.with_name("new.moec")
    artifact.write(package, path, graph_text="")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_arrays_that_no_port_reads_are_not_stored(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    arrays = {**package.arrays, "spare": np.zeros(1000)}
    artifact.write(replace(package, arrays=arrays), path, graph_text="")
    assert "spare" not in artifact.read(path).package.arrays


def test_empty_and_strided_arrays(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    arrays = {**package.arrays, "none": np.zeros((0, 3)), "turned": np.arange(6.0).reshape(2, 3).T}
    params = (*package.params, Port("none", "f64", (0, 3)), Port("turned", "f64", (3, 2)))
    artifact.write(replace(package, arrays=arrays, params=params), path, graph_text="")
    same(artifact.read(path).package.arrays, arrays)


def test_the_private_copy_of_the_code_is_gone_after_loading(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    executor.load(saved)
    assert os.listdir(place) == []
    shutil.rmtree(place)
