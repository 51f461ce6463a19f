"""The commands with the real compiler, on a model small enough for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moec.ir.graph import Program
from moec.ir.text import parse
from moec.passes.core.runner import Log
from moec.passes.lower.fuse_gate import FuseGate
from moec.report.report import Report
from tests.command_line import invoke

MODEL = """
import torch
from tests.capture.modules import Moe
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.moe = Moe()
        self.moe.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 8)) for _ in range(4)
        )

    def forward(self, x):
        x = self.first(x)
        return x + self.moe(x)


def make():
    torch.manual_seed(0)
    return Net(), (torch.randn(5, 6),)


def dense():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(5, 8),)


def broken():
    return 7


def fails():
    raise ValueError("no weights here")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "small.py"
    path.write_text(MODEL)
    return path


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    folder = tmp_path_factory.mktemp("out")
    result = invoke(
        "compile", f"{model}:make", "-o", folder / "small.moec", "--json",
        "--shapes", "x=T[1..64]x6", "--dump-ir", folder / "ir",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return folder / "small.moec", json.loads(result.stdout), folder / "ir"


def test_compile(compiled: tuple[Path, Any, Path]) -> None:
    path, report, _ = compiled
    assert path.exists()
    (block,) = report["blocks"]
    assert (block["name"], block["experts"], block["top_k"]) == ("moe", 4, 2)
    assert (block["router"], block["activation"]) == ("softmax, top-2", "silu")
    assert report["sizes"] == {"T": [1, 64]}
    assert report["parameters"] == 6 * 8 + 8 + 4 * 8 + 4 * (8 * 24 + 24 + 24 * 8 + 8)
    (checked,) = report["verification"]
    assert checked["error"] <= checked["tolerance"]


def test_every_step_was_dumped(compiled: tuple[Path, Any, Path]) -> None:
    _, report, folder = compiled
    names = [file.name for file in sorted(folder.iterdir())]
    assert names == [f"{i:02d}-{p['name']}.moe" for i, p in enumerate(report["passes"])]
    for file in folder.iterdir():
        parse(file.read_text())


def test_inspect_the_artifact(compiled: tuple[Path, Any, Path], tmp_path: Path) -> None:
    path, report, _ = compiled
    result = invoke("inspect", path, "--json", "--graph", tmp_path / "out.dot")
    assert result.exit_code == 0, result.stderr
    inspected = json.loads(result.stdout)
    assert inspected["blocks"] == report["blocks"]
    assert inspected["kernels"] == report["kernels"]
    assert "softmax, top-2" in (tmp_path / "out.dot").read_text()


def test_inspect_a_model(model: Path, tmp_path: Path) -> None:
    result = invoke("inspect", f"{model}:make", "--quiet", "--graph", tmp_path / "out.dot")
    assert result.exit_code == 0, result.stderr
    assert "1 MoE block\nmoe\n  experts     2 of 4 per token, silu\n" in result.stdout
    assert "MoE: 2 of 4 experts" in (tmp_path / "out.dot").read_text()


def test_a_model_without_moe(model: Path) -> None:
    result = invoke("compile", f"{model}:dense", "--dry-run", "--quiet", "--json")
    report = Report.of_dict(json.loads(result.stdout))
    assert report.blocks == ()
    assert "No MoE block was recognised" in str(report)


def test_stop_after(model: Path) -> None:
    result = invoke("compile", f"{model}:make", "--stop-after", "recognise", "--quiet")
    graph = parse(result.stdout)
    assert "moe.experts" in {op.name for op in graph.ops}


def test_bisect(model: Path) -> None:
    result = invoke("bisect", f"{model}:make", "--quiet")
    assert result.exit_code == 0, result.stdout
    assert "none changes the numbers" in result.stdout


def test_bisect_finds_a_pass_that_is_wrong(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FuseGate.run

    def wrong(self: FuseGate, program: Program, log: Log) -> Program:
        """It renormalises where the model does not."""
        output = right(self, program, log)
        ops = tuple(
            replace(op, attrs={**op.attrs, "renormalize": True}) if op.name == "moe.gate" else op
            for op in output.graph.ops
        )
        return replace(output, graph=replace(output.graph, ops=ops))

    monkeypatch.setattr(FuseGate, "run", wrong)
    result = invoke("bisect", f"{model}:make", "--json", "--quiet")
    assert result.exit_code == 4
    culprit = json.loads(result.stdout)["culprit"]
    assert (culprit["pass_name"], culprit["rewrite"], culprit["of"]) == ("fuse-gate", 1, 1)
    assert "moe.route" in culprit["what"]
    assert culprit["before"] < 1e-5 < culprit["after"]


def test_failed_verification(model: Path, tmp_path: Path) -> None:
    result = invoke(
        "compile", f"{model}:make", "-o", tmp_path / "x.moec", "--verify", "1e-12", "-q"
    )
    assert result.exit_code == 4
    assert result.stderr.startswith("error: output differs from eager by ")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (1, ["no/such/folder"], "no/such/folder does not exist: give the folder of a checkpoint"),
        (2, ["MODEL"], "name the function that returns the model: "),
        (1, ["MODEL:nothing"], "has no function nothing"),
        (1, ["MODEL:broken"], "must return (module, arguments)"),
        (1, ["MODEL:fails"], "fails() fails: ValueError: no weights here"),
        (2, ["MODEL:make", "--target", "z80"], "unknown target 'z80'; the known targets are cpu"),
        (2, ["MODEL:make", "--passes", "fuse-gate"], "--passes fuse-gate: write +fuse-gate or"),
        (2, ["MODEL:make", "--passes=-expand-experts"], "code generation needs expand-experts"),
        (2, ["MODEL:make", "--stop-after", "lunch"], "--stop-after lunch: no such pass"),
        (2, ["MODEL:make", "--shapes", "y=Tx6"], "names y, but the arguments are x"),
        (2, ["MODEL:make", "--shapes", "x=TxD"], "--shapes: the model fixes D at 6; write 6 in"),
        (2, ["MODEL:make", "--shapes", "x=Tx9"], "the size 9 where the example input has 6;"),
        (2, ["MODEL:make", "--shapes", "x=T[100..200]x6"], "size 5, which is not within 100..200"),
        (2, ["MODEL:make", "--shapes", "x=TxSxU"], "x has 2 axes, but axis 2 is named"),
    ],
)
def test_mistakes(model: Path, code: int, arguments: list[str], words: str) -> None:
    inputs = [a.replace("MODEL", str(model)) for a in arguments]
    result = invoke("compile", *inputs, "--dry-run", "--quiet")
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
