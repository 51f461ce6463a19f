"""`moec eval`: artifacts beside eager PyTorch."""

from __future__ import annotations

import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moec
from moec.optimise.evaluation.evaluate import Estimate, Evaluation, ModelScore, TaskScore, TextScore
from tests.command_line import invoke

TEXT = "def read_lines(path):\n    with open(path) as file:\n        return list(file)\n" * 8


run = partial(invoke, "eval")


@pytest.fixture(scope="module")
def path(compiled_tiny_moe: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    compiled_tiny_moe.save(folder / "tiny.moec")
    (folder / "text.txt").write_text(TEXT)
    tasks = [
        {"query": "import ", "choices": ["os\n", "}}}", "0x"], "gold": 0},
        {"query": "def f(x):\n    return ", "choices": ["x\n", ")))", "def"], "gold": 0},
    ]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return folder / "tiny.moec"


def test_an_artifact_beside_its_checkpoint(path: Path, tiny_moe: Path) -> None:
    options = ["--text", path.parent / "text.txt", "--tasks", path.parent / "tasks.jsonl"]
    result = run(tiny_moe, path, *options, "--window", "64", "--json")
    assert result.exit_code == 0, result.stderr
    eager, ours = json.loads(result.stdout)["models"]
    assert eager["name"].endswith("(eager)")
    assert ours["name"] == "tiny.moec"
    # In bf16, the rounding of both moves a token's log probability by hundredths of a nat.
    assert ours["text"]["nats"]["mean"] == pytest.approx(eager["text"]["nats"]["mean"], rel=5e-3)
    assert ours["text"]["kl"]["mean"] < 5e-3
    assert ours["text"]["agreement"]["mean"] > 0.95
    assert ours["tasks"]["tasks"] == eager["tasks"]["tasks"] == 2
    assert ours["tasks"]["accuracy"]["mean"] == 1.0


def test_one_window_has_no_interval_and_is_json(path: Path, tmp_path: Path) -> None:
    """Of an artifact that is a folder."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "folder")
    result = run(
        tmp_path / "folder", "--text", path.parent / "text.txt", "--window", "1024", "--json"
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (model,) = json.loads(result.stdout, parse_constant=refuse)["models"]
    assert model["name"] == "folder"
    assert model["text"]["nats"]["error"] is None


def test_perplexity_is_transformers_loss(path: Path, tiny_moe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_moe)
    ids = torch.tensor([moec.load(path).tokenizer.encode(TEXT)])[:, :200]
    text = moec.load(path).tokenizer.decode(ids[0].tolist())
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    evaluation = moec.evaluate([tiny_moe], text, window=200)
    score = evaluation.models[0].text
    assert score is not None
    assert score.predicted == 199
    assert score.nats.mean == pytest.approx(loss, rel=1e-3)


def evaluation() -> Evaluation:
    def score(nats: float, kl: float | None) -> TextScore:
        others = (None, None) if kl is None else (Estimate(kl, kl / 10), Estimate(0.93, 0.01))
        return TextScore(Estimate(nats, 0.02), nats / 3, 4096, *others)

    tasks = TaskScore(Estimate(0.5, 0.02), Estimate(0.55, 0.02), 400)
    return Evaluation(
        (
            ModelScore("model (eager)", 7_000_000, 5575, score(2.0, None), tasks),
            ModelScore("model.moec", 2_700_000, 39215, score(2.01, 7e-3), tasks),
        ),
        512,
        256,
    )


def test_as_text(golden: Any) -> None:
    golden(str(evaluation()))
    assert "<pre>model" in evaluation()._repr_html_()


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, (), "give --text FILE, --tasks FILE.jsonl, or both"),
        (1, ("--text", "absent"), "absent: there is no such file"),
        (1, ("--text", "LATIN"), "LATIN is not UTF-8 at byte 1: convert it first"),
        (2, ("--text", "TEXT", "--window", "8", "--stride", "8"), "the stride is from 1 to the"),
        (2, ("--text", "TEXT", "--window", "5000"), "takes at most 1024 tokens: give a shorter"),
    ],
)
def test_refusals(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("LATIN").write_bytes(b"a\xe9")
    Path("TEXT").write_text(TEXT)
    result = run(path, *words)
    assert result.exit_code == code
    assert message in result.stderr


def test_what_is_no_language_model(tmp_path: Path) -> None:
    moec.compile(torch.nn.Linear(3, 3), (torch.ones(2, 3),)).save(tmp_path / "linear.moec")
    (tmp_path / "text").write_text("text")
    result = run(tmp_path / "linear.moec", "--text", tmp_path / "text")
    assert result.exit_code == 1
    assert "gives no logits [B, S, V] for tokens alone" in result.stderr
