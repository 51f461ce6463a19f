"""moec inspect: models and artifacts, as text, data and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from moec.ir.text import print_graph
from moec.report.report import Report
from moec.runtime.artifact import manifest
from moec.runtime.artifact.artifact import write
from moec.runtime.artifact.container import open_container
from tests.command_line import invoke
from tests.commands import models
from tests.commands.conftest import FakeCompiler
from tests.runtime import toy

run = partial(invoke, "inspect")


def test_a_model(compiler: FakeCompiler) -> None:
    result = run("model")
    assert result.exit_code == 0
    for words in ("3 MoE blocks", "layers.{0..2}.moe", "a linear layer is no expert", "T 1 to 512"):
        assert words in result.stdout
    assert compiler.request["verify"] is False


def test_json(compiler: FakeCompiler) -> None:
    report = Report.of_dict(json.loads(run("model", "--json").stdout))
    assert [b.experts for b in report.blocks] == [4, 4, 4]


def test_a_picture(compiler: FakeCompiler, tmp_path: Path) -> None:
    out = tmp_path / "out.dot"
    result = run("model", "--graph", out)
    assert result.stdout.endswith(f"drew {out}\n")
    assert "softmax, top-2" in out.read_text()


def test_a_picture_of_another_kind_is_refused_before_the_work(compiler: FakeCompiler) -> None:
    result = run("model", "--graph", "out.png")
    assert result.exit_code == 2
    assert result.stderr == ("error: --graph out.png: the name must end in .dot\n")
    assert compiler.request == {}


def test_what_is_no_artifact(tmp_path: Path) -> None:
    path = tmp_path / "x.moec"
    path.write_bytes(b"not a zip")
    result = run(path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {path}")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that holds a report, for a machine that is not this one."""
    path = tmp_path_factory.mktemp("artifact") / "toy.moec"
    package = toy.package()
    elsewhere = replace(package.target, name="elsewhere", features=("no-such-feature",))
    graph = print_graph(models.graph())
    recorded = {"report": models.report().to_dict()}
    write(replace(package, target=elsewhere), path, graphs={"main": graph}, extra=recorded)
    return path


def test_an_artifact_for_any_machine(artifact: Path, tmp_path: Path) -> None:
    result = run(artifact, "--json")
    assert result.exit_code == 0, result.stderr
    report = Report.of_dict(json.loads(result.stdout))
    assert report.blocks == models.report().blocks
    assert report.bytes_out == sum(
        part.size for name, part in _manifest(artifact).parts.items() if name.startswith("weights/")
    )
    assert "grouped" in run(artifact).stdout
    drawn = tmp_path / "out.dot"
    assert run(artifact, "--graph", drawn).exit_code == 0
    assert "MoE: 2 of 4 experts" in drawn.read_text()


def _manifest(path: Path) -> manifest.Manifest:
    return manifest.load(open_container(path)[manifest.NAME])


def test_an_altered_artifact(artifact: Path, tmp_path: Path) -> None:
    content = bytearray(artifact.read_bytes())
    content[content.index(b"graph main")] ^= 1
    altered = tmp_path / "altered.moec"
    altered.write_bytes(content)
    result = run(altered)
    assert result.exit_code == 1
    assert "graphs/main.moec" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_artifact_without_a_report(tmp_path: Path) -> None:
    path = tmp_path / "bare.moec"
    write(toy.package(), path, graphs={"main": print_graph(models.graph())})
    result = run(path)
    assert result.exit_code == 1
    assert "has no report; compile it again" in result.stderr
