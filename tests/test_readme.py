"""Every block of the README runs, in the order of its section, in a folder of the section's own:
python blocks and console blocks."""

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
    for found in BLOCK.finditer(markdown):
        if not found["why"]:
            yield Block(found["kind"], found["text"], markdown.count("\n", 0, found.start("text")))


def command(block: Block) -> list[str]:
    if block.kind == "python":
        return [sys.executable, "-W", "error::UserWarning", "-c", block.text]
    lines = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    return ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


def test_blocks_are_found():
    text = "<!-- not run: no -->\n```console\n$ a\n```\n\n```python\nb\n```\n```\nart\n```\n"
    assert list(blocks(text)) == [Block("python", "b\n", 6)]
    assert command(Block("console", "$ a\noutput\n$ b | c\n", 1))[-1] == "a\nb | c"


def sections(markdown: str) -> dict[str, list[Block]]:
    """The blocks under each heading of the second level, where there are any."""
    starts = [*re.finditer(r"^## (.+)$", markdown, re.M)]
    lines = [markdown.count("\n", 0, start.start()) for start in starts]
    found: dict[str, list[Block]] = {}
    for block in blocks(markdown):
        name = [s[1] for s, line in zip(starts, lines, strict=True) if line < block.line][-1]
        found.setdefault(name, []).append(block)
    return found


SECTIONS = sections((ROOT / "README.md").read_text(encoding="utf-8"))


def test_sections_hold_all_blocks():
    assert sections("## a\n```python\n1\n```\n## b\n## c\n### d\n```console\n$ e\n```\n") == {
        "a": [Block("python", "1\n", 2)],
        "c": [Block("console", "$ e\n", 8)],
    }
    assert {block.kind for found in SECTIONS.values() for block in found} == {"python", "console"}


@pytest.mark.long
@pytest.mark.parametrize("section", SECTIONS)
def test_readme_runs(section, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for block in SECTIONS[section]:
        done = subprocess.run(
            command(block), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            pytest.fail(f"README.md:{block.line}, exit code {done.returncode}\n{done.stderr}")


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "examples/tiny_moe/README.md"):
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{name} links to {target}"
