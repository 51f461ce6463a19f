"""`moec verify` reports intact and damaged parts, and runs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moec.__main__ import cli
from moec.runtime.artifact import artifact
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
    result = CliRunner().invoke(cli, ["verify", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_an_intact_artifact(path: Path) -> None:
    code, out, err = run(path)
    assert (code, err) == (0, "")
    assert "toy.moec is intact: 6 parts," in out
    assert "functions main, for generic" in out
    code, out, _ = run(path, "--json")
    assert json.loads(out)["graphs_checked"] is True


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
