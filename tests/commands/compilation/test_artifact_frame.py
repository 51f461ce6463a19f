"""A large artifact is cached without the weights that the checkpoint has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import moec
from moec import __main__ as front
from moec.cache import ARTIFACTS, FRAMES, entries, load, save, store_in
from moec.checkpoint import paged
from moec.commands.compilation import artifact_cache, artifact_frame
from moec.commands.compilation.artifact_frame import Frame, complete, decode, encode, frame_of
from moec.model.compiled import CompiledModel

ROOM = 1 << 30


@pytest.fixture(scope="module")
def compiled(short_moe: Path) -> CompiledModel:
    return moec.compile(str(short_moe), verify=False)


@pytest.fixture(scope="module")
def artifact(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled.save(path := tmp_path_factory.mktemp("frame") / "out.moec")
    return path


@pytest.fixture(scope="module")
def frame(compiled: CompiledModel, artifact: Path, short_moe: Path) -> Frame:
    frame = frame_of(compiled, artifact, short_moe, ROOM)
    assert frame is not None
    return frame


def test_a_frame_holds_little_and_gives_every_byte_again(
    frame: Frame, compiled: CompiledModel, artifact: Path, short_moe: Path, tmp_path: Path
) -> None:
    weights = sum(array.nbytes for array in compiled._package().arrays.values())
    assert sum(part.size for part in frame.parts) > 0.95 * weights
    assert decode(encode(frame)) == frame
    assert complete(frame, short_moe, tmp_path / "again.moec")
    assert (tmp_path / "again.moec").read_bytes() == artifact.read_bytes()


@pytest.mark.parametrize("target", ["avx2", "amx"])
def test_pairs_of_16_bits(short_moe: Path, tmp_path: Path, target: str) -> None:
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    small = AutoModelForCausalLM.from_pretrained(short_moe, dtype="bfloat16", num_hidden_layers=1)
    small.save_pretrained(model)
    compiled = moec.compile(str(model), target=target, verify=False, kv_cache=False)
    compiled.save(path := tmp_path / "out.moec")
    frame = frame_of(compiled, path, model, ROOM)
    assert frame is not None
    assert len(frame.content) < path.stat().st_size / 2
    assert complete(frame, model, again := tmp_path / "again.moec")
    assert again.read_bytes() == path.read_bytes()


def test_computed_weights_are_not_left_out(short_moe: Path, tmp_path: Path) -> None:
    """The codes of quantised weights are in no file."""
    compiled = moec.compile(str(short_moe), quant="int8", verify=False, kv_cache=False)
    compiled.save(path := tmp_path / "out.moec")
    frame = frame_of(compiled, path, short_moe, ROOM)
    assert frame is not None
    left_out = sum(part.size for part in frame.parts)
    assert left_out + len(frame.content) == path.stat().st_size
    assert frame_of(compiled, path, short_moe, len(frame.content)) == frame
    assert frame_of(compiled, path, short_moe, len(frame.content) - 1) is None
    assert complete(frame, short_moe, tmp_path / "again.moec")
    assert (tmp_path / "again.moec").read_bytes() == path.read_bytes()


def test_weights_that_are_not_in_memory_are_not_read(
    short_moe: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "LEAST", 0)
    compiled = moec.compile(str(short_moe), verify=False, kv_cache=False, memory=100_000)
    assert compiled.source.memory.paged is not None
    assert frame_of(compiled, artifact, short_moe, ROOM) is None


def _change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _change,
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    ],
)
def test_other_weights_do_not_complete_it(
    frame: Frame, short_moe: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(short_moe, model)
    assert complete(frame, model, tmp_path / "a.moec")
    damage(model / "model.safetensors")
    assert not complete(frame, model, tmp_path / "b.moec")


def test_bytes_that_are_no_frame() -> None:
    assert decode(b"") is None
    assert decode(b"\x93\1\2\3") is None


def test_the_command_compiles_once(
    short_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(artifact_cache, "CACHE_FRACTION", 1000)  # 2 MiB
    store, output = store_in(tmp_path / "cache"), tmp_path / "out.moec"
    model = tmp_path / "model"
    shutil.copytree(short_moe, model)

    def run() -> str:
        words = ["compile", str(model), "-o", str(output), "--verify", "off", "--force"]
        result = CliRunner().invoke(front.cli, words, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    run()
    content = output.read_bytes()
    (entry,) = (entry for entry in entries(store) if entry.kind in (ARTIFACTS, FRAMES))
    assert (entry.kind, entry.size < len(content) / 2) == (FRAMES, True)

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("moec.api.compile", never)
    output.unlink()
    assert run().endswith(f"wrote {output} (from the cache)\n")
    assert output.read_bytes() == content

    frame = decode(load(store, FRAMES, entry.path.name) or b"")
    assert frame is not None
    forged = artifact_frame.Frame(frame.size, frame.files, frame.parts[1:], frame.content)
    for damaged in (b"", encode(forged)):
        save(store, FRAMES, {entry.path.name: damaged})
        output.write_bytes(b"")
        with pytest.raises(AssertionError, match="compiled again"):
            run()
        assert output.read_bytes() == b""
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".moec")]
