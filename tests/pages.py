"""Code blocks of Markdown pages, for the tests that run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fresh import Program, Result, Warm, moec_command

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    line: int


def blocks(markdown: str) -> Iterator[Block]:
    """The blocks that are run, with the line of their first line."""
    for match in BLOCK.finditer(markdown):
        if not match["why"]:
            yield Block(match["kind"], match["text"], markdown.count("\n", 0, match.start("text")))


def lines_of(block: Block) -> list[str]:
    """The commands of a console block: what follows "$ "."""
    return [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]


def words_of(line: str) -> tuple[str, ...] | None:
    """The arguments of a line that only calls moec, and so needs no shell."""
    words = shlex.split(line, comments=True)
    plain = not re.search(r"[|&;<>$*`\\]", line)
    return tuple(words[1:]) if plain and words[0] == "moec" else None


def run_block(block: Block, folder: Path, page: str, warm: Warm) -> None:
    """Run a block in a folder that has the examples; fail with the page and the line.

    The first command of a block runs in a shell; others that only call moec run in forks.
    """
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    if block.kind == "python":
        result = warm.run(Program(block.text, strict=True), folder)
        check(result, block, page)
        return
    for number, line in enumerate(lines_of(block)):
        words = words_of(line) if number else None
        if words is None:
            check(run_in_shell(line, folder), block, page)
        else:
            check(warm.run(moec_command(*words), folder), block, page)


def run_in_shell(line: str, folder: Path) -> Result:
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", line]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


def check(result: Result, block: Block, page: str) -> None:
    if result.returncode:
        pytest.fail(f"{page}:{block.line}, exit code {result.returncode}\n{result.stderr}")
