"""moec convert: its options, the output, and what it does not replace."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest

from tests.command_line import invoke

run = partial(invoke, "convert")


def test_writes_a_checkpoint_with_its_tokenizer(tiny_moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tiny_moe, "--quant", "int8", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"\[ .* s  \d+ %, about \d+ s left\] write", result.stderr)
    assert "experts int8" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"wrote {out} (")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_moe / name).read_bytes()


def test_json_is_one_document(tiny_moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = json.loads(run(tiny_moe, "--quant", "experts=int8", "-o", out, "--json").stdout)
    assert (report["path"], report["files"], [*report["formats"]]) == (
        str(out),
        1,
        ["experts int8"],
    )


WRONG = [
    (["--quant", "int4"], "name the folder with -o FOLDER"),
    (["--quant", "int4", "-o", "none/out"], "the folder none does not exist: create it first"),
    (["--quant", "fp8", "-o", "out"], "write int4:64 or int8 instead of fp8"),
    (["--quant", "int4:asymmetric", "-o", "out"], "symmetric: write int4:64 or int8 instead of"),
    (["--quant", "int4:48", "-o", "out"], ":48 is neither a block size nor an option"),
    (["--quant", "head=int8", "-o", "out"], "the head stays as it is"),
    (["--quant", "none", "-o", "out"], "give a format for experts and linear layers"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_wrong_arguments(tiny_moe: Path, arguments: list[str], words: str) -> None:
    result = run(tiny_moe, *arguments)
    assert result.exit_code == (1 if "does not exist" in words else 2)
    assert words in result.stderr


def test_what_is_replaced(tiny_moe: Path, tmp_path: Path) -> None:
    """Only with --force, only a checkpoint, and never the one that is read."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("important")
    arguments = (tiny_moe, "--quant", "int8", "-q", "-o", out)
    assert f"{out} exists; --force replaces it" in run(*arguments).stderr
    assert "no folder with a config.json, so --force" in run(*arguments, "--force").stderr
    assert (out / "notes").read_text() == "important"
    (out / "config.json").write_text("{}")
    assert run(*arguments, "--force").exit_code == 0
    assert not (out / "notes").exists()
    source = tmp_path / "source"
    shutil.copytree(tiny_moe, source)
    result = run(source, "--quant", "int8", "-o", source, "--force")
    assert "is the checkpoint itself: write to another folder" in result.stderr


def test_a_full_disk_is_reported_before_the_work(
    tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("moec.files.whole_folder.shutil.disk_usage", lambda path: usage(1000))
    result = run(tiny_moe, "--quant", "int8", "-q", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "0.000 GB are free" in result.stderr
    assert not list(tmp_path.iterdir())
