"""`moec optimize`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.command_line import invoke

MODEL = "examples/tiny_moe/checkpoint"
TEXT = "README.md"


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text(Path(TEXT).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def test_a_language_model_within_a_memory(calib: Path, tmp_path: Path) -> None:
    output = tmp_path / "tiny.moec"
    result = invoke("optimize", MODEL, "--calib", calib, "-o", output, "--memory", "3MB", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    notes = " ".join(report["notes"])
    assert "choose-experts: chose" in notes
    assert "kl " in notes
    assert len({line["format"] for line in report["quantised"]}) > 1
    weights = sum(line["bytes_after"] for line in report["quantised"])
    assert 1_500_000 < weights <= 3_000_000
    assert invoke("run", output, "--prompt", "def ", "--max-new-tokens", "3", "-q").exit_code == 0


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ("--memory", "3MB", "--write-choices", "a.json"), "the name must end in .yaml"),
        (2, (), "moec optimize needs a limit: give --memory, --token-bytes, --tokens-per-"),
        (2, ("--memory", "some"), "memory is 'some': give bytes"),
        (2, ("--loss", "kl<0.1"), "write kl<=0.02, perplexity<="),
        (2, ("--memory", "3MB", "--moves", "prunes"), "'prunes' is no move: moves are formats,"),
        (2, ("--recover", "--memory", "some"), "memory is 'some': give bytes"),
        (2, ("--token-bytes", "some"), "token_bytes is 'some': give bytes"),
        (2, ("--memory", "3MB", "--formats", "int7"), "'int7' is not a format"),
    ],
)
def test_refusals(
    code: int, arguments: tuple[str, ...], message: str, calib: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.moec"
    result = invoke("optimize", MODEL, "--calib", calib, "-o", output, *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not output.exists()


def test_an_artifact_is_not_replaced(calib: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.moec"
    output.write_bytes(b"")
    result = invoke("optimize", MODEL, "--calib", calib, "-o", output, "--memory", "3MB")
    assert "exists; --force replaces it" in result.stderr


def test_choices_are_written_and_applied(calib: Path, tmp_path: Path) -> None:
    choices, again, output = (tmp_path / name for name in ("a.yaml", "b.yaml", "tiny.moec"))
    for path, steps in ((choices, ()), (again, ("300",))):
        result = invoke(
            *("optimize", MODEL, "--calib", calib, "--write-choices", path, "--recover", *steps),
            *("--memory", "3MB"),
        )
        assert result.exit_code == 0, result.stderr
        assert f"wrote {path}" in result.stdout
        assert "predicted as a sum over choices" in result.stdout
        assert re.search(r"\] measure\n.*\] choose\n", result.stderr)
    assert choices.read_bytes() == again.read_bytes()
    text = choices.read_text(encoding="utf-8")
    assert "limits: memory 3.0 MB" in text
    assert "model.layers.0.mlp.experts#2: {rows: 128" in text
    assert "recover: 300" in text
    choices.write_text(text.replace("recover: 300", "recover: 2"), encoding="utf-8")
    result = invoke(
        "compile", MODEL, "-o", output, "--choices", choices, "--json", "--calib", calib
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert "choose-experts: chose" in " ".join(report["notes"])
    assert "recover-routers: 4 tensors of routers, 2 steps: " in " ".join(report["notes"])
    assert len({line["format"] for line in report["quantised"]}) > 1
    rows = {row["name"]: row for row in report["choices"]}
    for name, choice in yaml.safe_load(text)["products"].items():
        assert rows[name]["choice"] == choice["format"]
        assert rows[name]["bytes_saved"] == choice["bytes_before"] - choice["bytes"]
        assert rows[name]["damage"] == choice["damage"]


def test_loss_against_bytes(calib: Path, tmp_path: Path) -> None:
    """Choices are no worse than one format at its bytes, and better with more bytes."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "pareto.svg"
    result = invoke(
        *("optimize", MODEL, "--calib", calib, "--pareto", picture, "--json"),
        *("--memory", "3.5MB", "--formats", "int8,int4:32"),
    )
    assert result.exit_code == 0, result.stderr
    assert "MB of weights" in picture.read_text(encoding="utf-8")
    document = json.loads(result.stdout)
    points = document["pareto"]
    chosen = [point for point in points if point["choice"] == "chosen"]
    assert [point["choice"] for point in points] == ["int8", "int4:32", *["chosen"] * 6]
    sizes = [point["bytes"] for point in chosen]
    assert sizes == sorted(sizes)
    damages = [point["damage"] for point in chosen]
    assert damages[-1] < damages[1] < damages[0]
    int4 = next(point for point in points if point["choice"] == "int4:32")
    assert (sizes[0], damages[0]) == (int4["bytes"], pytest.approx(int4["damage"]))
    assert document["choices"]["bytes"] <= 3_500_000
