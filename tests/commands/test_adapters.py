"""`--adapter DIR` merges adapters, in every command that opens a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import invoke
from tests.sources.checkpoint import adapters

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(short_moe: Path, tmp_path: Path) -> Path:
    config = json.loads((short_moe / "config.json").read_bytes())
    inner = config["hidden_size"]
    out = config["num_attention_heads"] * config["head_dim"]
    return adapters.write(tmp_path / "tuned", adapters.factors(QUERY, out, inner))


def test_inspect(short_moe: Path, folder: Path) -> None:
    """Two adapters, in order; no path of this machine is in the report."""
    done = invoke("inspect", short_moe, "--adapter", folder, "--adapter", folder, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["notes"].count("adapter tuned: 1 weight changed") == 2
    assert str(folder.parent) not in json.dumps(report["notes"])


@pytest.mark.parametrize("words", [
    ("compile", "-o", "x.moec"), ("inspect",), ("export", "-o", "x.onnx"), ("bisect",),
])  # fmt: skip
def test_an_adapter_of_another_model(
    words: tuple[str, ...], short_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = adapters.write(tmp_path / "other", adapters.factors(QUERY, 7, 5))
    name, *rest = words
    done = invoke(name, short_moe, *rest, "--adapter", folder)
    assert done.exit_code == 1
    assert f"error: the adapter {folder} changes {QUERY}.weight as [7, 5], and" in done.stderr
