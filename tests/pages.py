"""Code blocks of Markdown pages, for the tests that run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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


def command(block: Block) -> list[str]:
    """What runs a block: Python, or the lines after "$ " in bash."""
    if block.kind == "python":
        return [sys.executable, "-W", "error::UserWarning", "-c", block.text]
    lines = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    return ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


def run_block(block: Block, folder: Path, page: str) -> None:
    """Run a block in a folder that has the examples; fail with the page and the line."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command(block), cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{page}:{block.line}, exit code {done.returncode}\n{done.stderr}")
