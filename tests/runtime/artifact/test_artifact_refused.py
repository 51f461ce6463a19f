"""Damaged, foreign and forged artifacts are refused in one sentence."""

from __future__ import annotations

import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.errors import ArtifactError
from moec.runtime.artifact import artifact, manifest
from moec.runtime.call import executor
from moec.runtime.package import Package
from moec.target.cpu import CpuNeeds
from tests.runtime import toy
from tests.runtime.damaged import add_member, edit_manifest, edit_package, refused, same, unpacked


def main(text: dict[str, Any]) -> Any:
    """The function `main` of a manifest."""
    return text["package"]["functions"]["main"]


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
    assert "has no manifest.json" in refused(tmp_path / "other.zip")
    assert "has no manifest.json" in refused(tmp_path)


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
    full = artifact.read(saved, copy=True)
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
        assert read.package.library == full.package.library
        same(read.package.arrays, full.package.arrays)


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


@pytest.mark.parametrize("name", ["graphs/main.moec", "kernels/lib.so", "weights/00007.bin"])
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
    words = (
        f"has format {version}, which is {word} than the format {manifest.FORMAT} of this moec: "
    )
    assert f"{words}make it again by moec compile MODEL -o NAME" in refused(folder)


def test_another_version_of_tvm(saved: Path) -> None:
    folder = unpacked(saved)
    edit_package(folder, versions={"tvm": "0.11.0"})
    words = refused(folder)
    assert "was compiled with TVM 0.11.0, and TVM 0." in words
    assert "install apache-tvm 0.11.0" in words


def test_a_cpu_without_the_features(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    needs = CpuNeeds("future", features=("avx2048",))
    artifact.write(replace(package, target=needs), path, graphs={"main": toy.GRAPH})
    assert "needs avx2048, which this CPU lacks" in refused(path)


def test_another_machine(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    needs = CpuNeeds("far", mtriple="riscv64-unknown-linux-gnu")
    artifact.write(replace(package, target=needs), path, graphs={"main": toy.GRAPH})
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
    artifact.write(replace(package, library=library), path, graphs={"main": toy.GRAPH})
    assert words in refused(path)


def test_a_library_that_does_not_load(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    assert isinstance(package.library, bytes)
    artifact.write(replace(package, library=package.library[:64]), path, graphs={"main": toy.GRAPH})
    with pytest.raises(ArtifactError, match="the native code fails to load"):
        executor.load(path)


def test_a_library_without_the_model(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    library = toy.language_model_library("other")
    artifact.write(replace(package, library=library), path, graphs={"main": toy.GRAPH})
    with pytest.raises(ArtifactError, match=r"the native code fails to load: .*'main'"):
        executor.load(path)


def test_native_code_may_be_left_out(package: Package, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    artifact.write(package, path, graphs={"main": toy.GRAPH}, native=False)
    assert artifact.read(path).package.library == b""
    with pytest.raises(ArtifactError, match="has no native code: run it with --rebuild"):
        executor.load(path)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a//b", "a\\b", "a/./b", "c:evil", ".."])
def test_names_that_lead_elsewhere(saved: Path, name: str) -> None:
    add_member(saved, name)
    assert "is not a valid name of a part" in refused(saved)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members(saved: Path) -> None:
    add_member(saved, "graphs/main.moec")
    assert "holds 'graphs/main.moec' twice" in refused(saved)


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
    assert "'inner' is not where the zip directory says" in refused(path)


def test_a_directory_that_points_to_another_member(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        first, at = archive.infolist()[0], archive.start_dir
    second = at + 46 + len(first.filename)
    content[second + 42 : second + 46] = struct.pack("<I", first.header_offset)
    saved.write_bytes(content)
    assert "is not where the zip directory says" in refused(saved)


def _between(content: bytes, at: int) -> bytes:
    """Bytes put before the second member, and all offsets moved."""
    moved = bytearray(content[:at] + b"stray" + content[at:])
    central = moved.index(b"PK\1\2")
    for entry in [*re.finditer(b"PK\x01\x02", moved[central:])][1:]:
        offset_at = central + entry.start() + 42
        (offset,) = struct.unpack_from("<I", moved, offset_at)
        struct.pack_into("<I", moved, offset_at, offset + 5)
    struct.pack_into("<I", moved, len(moved) - 6, central)
    return bytes(moved)


def _commented(path: Path, archive: str, member: str) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.comment = archive.encode()
        file.infolist()[0].comment = member.encode()
        file._didModify = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [
    lambda path: path.write_bytes(path.read_bytes() + b"x"),
    lambda path: path.write_bytes(path.read_bytes() + bytes(60_000)),
    lambda path: path.write_bytes(b"x" + path.read_bytes()),
    lambda path: path.write_bytes(b"PK" + path.read_bytes()),
    lambda path: path.write_bytes(
        _between(path.read_bytes(), zipfile.ZipFile(path).infolist()[1].header_offset)
    ),
    lambda path: _commented(path, "a comment", ""),
    lambda path: _commented(path, "", "a comment"),
])  # fmt: skip
def test_bytes_of_no_part(saved: Path, change: Callable[[Path], object]) -> None:
    """They have no hash, so nobody would notice what they are."""
    change(saved)
    words = refused(saved)
    assert "has bytes that belong to no part" in words or "is not a moec artifact" in words


def test_folders_in_a_zip(saved: Path) -> None:
    folder = unpacked(saved)
    again = shutil.make_archive(str(saved.with_name("again")), "zip", folder)
    content = zipfile.ZipFile(again)
    with zipfile.ZipFile(saved, "w") as archive:
        for member in content.infolist():
            archive.writestr(member.filename, content.read(member))
    assert any(name.endswith("/") for name in content.namelist())
    executor.load(saved)


def test_packed_again_by_another_program(saved: Path) -> None:
    """Stored but not aligned: the weights are copied to where kernels can read them."""
    inputs = toy.inputs()
    y = executor.load(saved)(inputs)["y"]
    folder = unpacked(saved)
    again = saved.with_name("again.moec")
    with zipfile.ZipFile(again, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    np.testing.assert_array_equal(executor.load(again)(inputs)["y"], y)


def test_a_folder_never_follows_a_link(saved: Path) -> None:
    folder = unpacked(saved)
    elsewhere = folder.with_name("elsewhere")
    (folder / "graphs" / "main.moec").rename(elsewhere)
    (folder / "graphs" / "main.moec").symlink_to(elsewhere)
    assert "graphs/main.moec is missing" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.pop("package"),
        lambda text: text["package"].pop("functions"),
        lambda text: text["package"]["functions"].pop("main"),
        lambda text: text["package"]["functions"].update(decode=main(text)),
        lambda text: text["package"].update(routers=[{"layer": "a", "experts": "b"}]),
        lambda text: text["package"].update(generation={"vocabulary": 7}),
        lambda text: main(text).update(inputs=7),
        lambda text: main(text)["inputs"][0].update(dtype="f31"),
        lambda text: main(text)["inputs"][0].update(shape=["__import__('os')"]),
        lambda text: main(text)["inputs"][0].update(shape=["(" * 400 + "T" + ")" * 400]),
        lambda text: main(text)["inputs"][0].update(shape=[-1]),
        lambda text: main(text)["inputs"][0].update(shape=[2.5]),
        lambda text: main(text).update(sizes={"T": [0]}),
        lambda text: main(text)["params"][0].update(shape=[4, 4]),
        lambda text: main(text)["params"][0].update(name="gone"),
        lambda text: main(text)["states"][0].update(shape=["T"]),
        lambda text: text["arrays"]["w"].update(shape=[4, 300]),
        lambda text: text["arrays"]["w"].update(part="weights/none.bin"),
        lambda text: text["arrays"]["w"].update(dtype=7),
        lambda text: text["parts"].pop("weights/00007.bin"),
        lambda text: text["parts"].pop("graphs/main.moec"),
        lambda text: text.update(samples=[{}]),
    ],
)
def test_a_forged_manifest(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    folder = unpacked(saved)
    edit_manifest(folder, change)
    words = refused(folder)
    assert "malformed" in words or "has no graphs/main.moec" in words or "is not a size" in words


@pytest.mark.parametrize("text", [b"[1]", b"{}", b"nonsense", b"[" * 200_000, b"\xff\xfe"])
def test_a_manifest_that_is_none(saved: Path, text: bytes) -> None:
    folder = unpacked(saved)
    (folder / "manifest.json").write_bytes(text)
    refused(folder)
