"""`moec run --prompts`: each line has its index, its text or its error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moec
from tests.command_line import invoke

NEW = 12


@pytest.fixture(scope="module")
def path(compiled_tiny_moe: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "tiny.moec"
    compiled_tiny_moe.save(path)
    return path


def run(path: Path, prompts: Path, *more: str) -> Any:
    words = ["run", str(path), "--prompts", str(prompts), "--max-new-tokens", str(NEW), *more]
    return invoke(*words)


def rows_of(result: Any) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({row["index"] for row in rows}) == len(rows)
    return {row["index"]: row for row in rows}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


PROMPTS = [f"def f{n}({', '.join('abcdefgh'[: n % 9])}):" for n in range(13)]


@pytest.mark.parametrize("more", [(), ("--temperature", "1", "--seed", "7")])
def test_a_text_does_not_depend_on_the_others(path: Path, tmp_path: Path, more: Any) -> None:
    prompts = write(tmp_path, "p.txt", "\n".join(PROMPTS))
    result = run(path, prompts, "--batch", "4", *more)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(result)
    assert [rows[n]["prompt"] for n in range(13)] == PROMPTS
    assert rows == rows_of(run(path, prompts, "--batch", "1", *more))
    if not more:
        texts = moec.load(path).generate(PROMPTS, max_new_tokens=NEW)
        written = [text[len(p) :] for p, text in zip(PROMPTS, texts, strict=True)]
        assert [rows[n]["text"] for n in range(13)] == written


def test_beams(path: Path, tmp_path: Path) -> None:
    """Of prompts that come and go, and of one, whose text is written when the search has ended."""
    prompts = write(tmp_path, "p.txt", "\n".join(PROMPTS[:5]))
    more = ("--beams", "3", "--length-penalty", "0.5", "--early-stopping", "true")
    result = run(path, prompts, "--batch", "2", *more)
    assert result.exit_code == 0, result.stderr
    options: dict[str, Any] = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}
    texts = moec.load(path).generate(PROMPTS[:5], max_new_tokens=NEW, **options)
    rows = rows_of(result)
    assert [PROMPTS[n] + rows[n]["text"] for n in range(5)] == texts
    words = ["run", str(path), "--prompt", PROMPTS[0], "--max-new-tokens", str(NEW), *more]
    alone = invoke(*words)
    assert PROMPTS[0] + alone.stdout.removesuffix("\n") == texts[0]
    assert "searched with 3 beams" in alone.stderr
    for refused, named in ((("--stop", "x"), "--stop"), (("--temperature", "1"), "temperature")):
        result = invoke(*words, *refused)
        assert result.exit_code == 2
        assert f"num_beams is 3, and {named} is for texts" in result.stderr


def test_prompts_fail_alone(path: Path, tmp_path: Path) -> None:
    long = "a = 1\n" * 300
    lines = [json.dumps("x ="), "", "17", json.dumps(long), "{", json.dumps("y =")]
    result = run(path, write(tmp_path, "p.jsonl", "\n".join(lines) + "\n"))
    assert result.exit_code == 3
    rows = rows_of(result)
    assert {n: row["error"][:30] for n, row in rows.items() if "error" in row} == {
        1: "the prompt is empty",
        2: "the line is no JSON string",
        3: rows[3]["error"][:30],
        4: "the line is no JSON string",
    }
    assert "tokens, and a text has at most 1024" in rows[3]["error"]
    assert rows[0]["tokens"] == rows[5]["tokens"] == NEW


def test_blank_lines_count(path: Path, tmp_path: Path) -> None:
    result = run(path, write(tmp_path, "p.txt", "\nx =\n\ny =\n"))
    assert result.exit_code == 3
    assert {n: "error" in row for n, row in rows_of(result).items()} == {
        0: True, 1: False, 2: True, 3: False,
    }  # fmt: skip


def test_a_run_that_was_ended_goes_on(path: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path, "p.txt", "\n".join(PROMPTS[:6]))
    every = run(path, prompts).stdout
    lines = every.splitlines(keepends=True)
    part = write(tmp_path, "part.jsonl", "".join(lines[:3]) + lines[3][:20])
    left = run(path, prompts, "--resume", str(part))
    assert left.exit_code == 0, left.stderr
    assert len(rows_of(left)) == 3
    assert sorted(lines) == sorted([*lines[:3], *left.stdout.splitlines(keepends=True)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", "line 1: it is no result of --prompts"),
        ('{"index": 99, "prompt": "x ="}\n', "line 1: it is no result of --prompts"),
        ('{"index": 0, "prompt": "z ="}\n', "line 1: it is of another prompt"),
    ],
)
def test_other_results_are_refused(path: Path, tmp_path: Path, content: str, message: str) -> None:
    result = run(
        path, write(tmp_path, "p.txt", "x =\n"), "--resume", str(write(tmp_path, "r", content))
    )
    assert result.exit_code == 1
    assert message in result.stderr


def test_resume_needs_prompts(path: Path, tmp_path: Path) -> None:
    words = ["run", str(path), "--prompt", "x", "--resume", str(tmp_path / "r")]
    result = invoke(*words)
    assert "--resume continues a run of --prompts: give both" in result.stderr
