"""Commands and functions take the id of a model of the hub where they take a path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import moec
from moec.errors import UsageError
from tests.command_line import invoke
from tests.files.hub_server import Hub, Repository, commit, connected, files_of

NAME = "org/short-MoE"


@pytest.fixture
def hub(short_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repository = Repository({commit(7): files_of(short_moe)}, {"main": commit(7), "v1": commit(7)})
    with connected(Hub({NAME: repository}), tmp_path, monkeypatch) as server:
        yield server


def test_compile(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact names the id and the commit, and no path of this machine."""
    path = tmp_path / "out.moec"
    words = ("compile", NAME, "-o", path, "--target", "null", "--verify", "off", "--force")
    words = (*words, "--revision", "v1")
    done = invoke(*words)
    assert done.exit_code == 0, done.stderr
    files = hub.repositories[NAME].commits[commit(7)]
    size = sum(len(files[name]) for name in hub.downloads)
    assert f"download {size / 1e6:.1f} MB of {NAME}\n" in done.stderr
    report = json.loads(invoke("inspect", path, "--json").stdout)
    assert report["model"] == NAME
    assert f"{NAME} of the hub, commit {commit(7)}" in report["notes"]
    assert str(tmp_path).encode() not in path.read_bytes()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = invoke(*words)
    assert done.exit_code == 0, done.stderr
    assert f"wrote {path} (from the cache)" in done.stdout
    assert "download" not in done.stderr
    assert hub.requests == []


def test_moec_compile(hub: Hub) -> None:
    compiled = moec.compile(NAME, revision=commit(7), stop_after="capture", verify=False)
    assert compiled.source.name == NAME
    assert f"{NAME} of the hub, commit {commit(7)}" in compiled.report().notes
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(
        UsageError, match="of the hub, and only these have revisions: leave 'v1' out"
    ):
        moec.compile(Path("a/b"), revision="v1")


@pytest.mark.parametrize("words", [
    ("compile", NAME, "-o", "x.moec"), ("inspect", NAME), ("export", NAME, "-o", "x.onnx"),
    ("bisect", NAME), ("bench", NAME),
])  # fmt: skip
def test_every_command_that_opens_a_model(words: tuple[str, ...], hub: Hub) -> None:
    done = invoke(*words, "--revision", "v9")
    assert done.exit_code == 1
    assert f"error: {NAME} has no revision 'v9'" in done.stderr
    assert hub.downloads == []


def test_options_are_checked_before_anything_is_downloaded(hub: Hub) -> None:
    done = invoke("compile", NAME, "-o", "x.moec", "--quant", "int7")
    assert "'int7' is not a format" in done.stderr
    assert hub.requests == []
