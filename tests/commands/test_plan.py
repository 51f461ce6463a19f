"""moec plan and moec routing: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from moec import __main__ as front
from moec.plan.plan import read_plan
from moec.runtime.routing_trace import of_ids, save_trace

MODEL = """
name: small
width: 64
weights: bf16
layers:
- {repeat: 2, attention: 16384, heads: 4, head_width: 16, kv_heads: 4, kv_values: 128,
   experts: 8, k: 2, hidden: 128}
"""


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "100"}).invoke(front.cli, arguments, prog_name="moec")


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(MODEL)
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "t.npz"
    ids = np.random.default_rng(0).zipf(1.5, (400, 2, 2)) % 8
    save_trace(of_ids(ids, 8), path)
    return str(path)


def test_table(model: str, trace: str) -> None:
    result = run("plan", model, "--cluster", "two-sockets", "--trace", trace)
    assert result.exit_code == 0, result.output
    assert "small on one box of 2 sockets: 2 devices" in result.stdout
    assert "1600 choices (measured)" in result.stdout
    assert "data sheet" in result.stdout
    assert "busiest/mean" in result.stdout


def test_files(model: str, trace: str, tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("p.json", "map.json", "p.svg")]
    options = zip(("-o", "--placement", "--picture"), map(str, names), strict=True)
    arguments = [
        "plan", model, "--cluster", "two-sockets", "--trace", trace, "--spare", "0",
        *(part for pair in options for part in pair),
    ]  # fmt: skip
    assert run(*arguments).exit_code == 0
    plan = read_plan(names[0])
    table = json.loads(names[1].read_text())["physical_to_logical_map"]
    assert table == [[e for held in layer.slots for e in held] for layer in plan.layers]
    assert names[2].read_text().startswith("<svg")
    again = run(*arguments)
    assert again.exit_code == 1
    assert "exists; --force replaces it" in again.stderr
    other = run("plan", model, "--cluster", "h100-8", "--compare", str(names[0]))
    assert "this plan" in other.stdout


def test_json_and_explanation(model: str) -> None:
    plan = json.loads(run("plan", model, "--cluster", "h100-8", "--json").stdout)
    assert plan["devices"] == 8
    assert {number["source"] for number in plan["numbers"]} == {"data sheet", "assumed"}
    text = run("plan", model, "--cluster", "h100-8", "--explain", "1").stdout
    assert "combinations of degrees considered" in text
    assert any(line.startswith(">") for line in text.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "no"], "no is no file and no preset"),
        (["--cluster", "h100-8", "--routing", "odd"], "odd is no distribution"),
        (["--cluster", "h100-8", "--spare", "x"], "write shares such as 0,0.125"),
        (["--cluster", "h100-8", "--explain", "7"], "the model has 2 layers"),
        (["--cluster", "h100-8", "--send", "f3"], "f3 is not one of"),
        (["--cluster", "h100-8", "--compute", "int8"], "has no FLOP/s of int8"),
        (["--cluster", "h100-8", "--trace", "no.npz"], "no.npz does not exist"),
        (["--cluster", "h100-8", "--picture", "p.png"], "a picture ends in .svg or .html"),
        (["--cluster", "h100-8", "--compare", "no.json"], "no.json"),
    ],
)
def test_refusals(model: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    result = run("plan", model, *arguments, "-o", str(output))
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert not output.exists()


def test_a_trace_of_another_model(trace: str) -> None:
    result = run("plan", "mixtral-8x7b", "--cluster", "h100-8", "--trace", trace)
    assert "is of 2 layers" in result.stderr


def test_routing(trace: str, tmp_path: Path) -> None:
    picture = tmp_path / "load.html"
    result = run("routing", trace, "--picture", str(picture))
    assert result.exit_code == 0, result.output
    assert "400 tokens, 1600 choices, 2 layers" in result.stdout
    assert "strongest pair" in result.stdout
    assert picture.read_text().startswith("<!doctype html>")
    assert len(json.loads(run("routing", trace, "--json").stdout)) == 2


def test_routing_refuses(tmp_path: Path) -> None:
    counts = tmp_path / "c.npy"
    np.save(counts, np.ones((2, 4)))
    result = run("routing", str(counts), "-o", str(tmp_path / "t.npz"))
    assert "a trace needs the experts of each token" in result.stderr
