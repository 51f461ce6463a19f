"""`moec verify` reports intact and damaged parts, and runs nothing."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import moec
from moec.errors import ArtifactError
from moec.runtime.artifact import artifact
from tests.command_line import invoke
from tests.runtime import toy

GRAPH = """graph main(x: f32[T, 4]) {
  y: f32[T, 4] = aten.relu.default(x)
  return y
}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    artifact.write(toy.package(), tmp_path / "toy.moec", graphs={"main": GRAPH})
    return tmp_path / "toy.moec"


def run(*words: object) -> tuple[int, str, str]:
    result = invoke("verify", *words)
    return result.exit_code, result.stdout, result.stderr


def test_an_intact_artifact(path: Path) -> None:
    code, out, err = run(path)
    assert (code, err) == (0, "")
    assert "toy.moec is intact: 6 parts," in out
    assert "functions main, for generic" in out
    code, out, _ = run(path, "--json")
    assert json.loads(out)["graphs_checked"] is True


def test_a_sample_with_nan(tmp_path: Path) -> None:
    sample = artifact.Sample({}, {"y": np.array([0, np.nan], np.float32)})
    path = tmp_path / "nan.moec"
    artifact.write(toy.package(), path, graphs={"main": GRAPH}, samples=[sample])
    code, out, err = run(path)
    assert (code, out) == (1, "")
    assert "nan.moec: the sample's y holds NaN: compile it again" in err


@pytest.mark.parametrize("folder", [False, True])
def test_a_member_that_the_manifest_does_not_list(path: Path, folder: bool) -> None:
    """It has no digest: "intact and signed" would be said of anything that was added."""
    if folder:
        shutil.unpack_archive(path, path := path.with_suffix(".folder"), "zip")
        (path / "kernels").mkdir(exist_ok=True)
        (path / "kernels/other.so").write_bytes(b"added")
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("kernels/other.so", b"added")
    code, out, err = run(path)
    assert (code, out) == (1, "")
    assert "holds 'kernels/other.so', which its manifest does not list" in err
    with pytest.raises(ArtifactError, match="which its manifest does not list"):
        moec.load(path)


def test_a_link_that_the_manifest_does_not_list(path: Path) -> None:
    shutil.unpack_archive(path, folder := path.with_suffix(".folder"), "zip")
    (folder / "notes").symlink_to(path.parent)
    code, _, err = run(folder)
    assert code == 1
    assert "holds 'notes', which its manifest does not list" in err


def test_a_weight_that_was_altered(path: Path) -> None:
    content = path.read_bytes()
    weight = toy.package().arrays["b"].tobytes()
    assert content.count(weight) == 1
    path.write_bytes(content.replace(weight, bytes(len(weight))))
    code, _, err = run(path)
    assert code == 1
    assert "was altered: its SHA-256 differs" in err


def test_a_graph_that_breaks_a_rule(tmp_path: Path) -> None:
    text = GRAPH.replace("relu.default(x)", "relu.default(gone)")
    artifact.write(toy.package(), path := tmp_path / "odd.moec", graphs={"main": text})
    code, _, err = run(path)
    assert code == 1
    assert "graphs/main.moec is malformed: " in err
    assert len(err.splitlines()) == 1
