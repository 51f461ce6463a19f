"""Every block of the README runs, in the order of its section, in a separate folder per section:
python blocks and console blocks."""

from __future__ import annotations

import re

import pytest

from tests.pages import ROOT, Block, blocks, lines_of, run_block, words_of

LINES = 110
WORDS = 25  # of a cell of a table


def test_blocks_are_found():
    text = "<!-- not run: no -->\n```console\n$ a\n```\n\n```python\nb\n```\n```\nart\n```\n"
    assert list(blocks(text)) == [Block("python", "b\n", 6)]
    assert lines_of(Block("console", "$ a\noutput\n$ b | c\n", 1)) == ["a", "b | c"]


def test_a_line_that_only_calls_moec_needs_no_shell():
    assert words_of('moec run x.moec --prompt "def f():"')[2:] == ("--prompt", "def f():")
    lines = ("ls", "moec doctor | head", "moec run $X", "A=1 moec")
    assert [words_of(line) for line in lines] == [None] * 4


def sections(markdown: str) -> dict[str, list[Block]]:
    """The blocks under each heading of the second level, where there are any."""
    starts = [*re.finditer(r"^## (.+)$", markdown, re.M)]
    lines = [markdown.count("\n", 0, start.start()) for start in starts]
    by_name: dict[str, list[Block]] = {}
    for block in blocks(markdown):
        name = [s[1] for s, line in zip(starts, lines, strict=True) if line < block.line][-1]
        by_name.setdefault(name, []).append(block)
    return by_name


README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = sections(README)


def test_sections_hold_all_blocks():
    assert sections("## a\n```python\n1\n```\n## b\n## c\n### d\n```console\n$ e\n```\n") == {
        "a": [Block("python", "1\n", 2)],
        "c": [Block("console", "$ e\n", 8)],
    }
    assert {block.kind for held in SECTIONS.values() for block in held} == {"python", "console"}


def test_it_is_short():
    assert len(README.splitlines()) <= LINES


def test_cells_of_tables_are_short():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    cells = [re.sub(r"\]\([^)]*\)", "", cell) for row in rows for cell in row.split("|")]
    assert [cell for cell in cells if len(cell.split()) > WORDS] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_readme_runs(section, tmp_path, warm):
    for block in SECTIONS[section]:
        run_block(block, tmp_path, "README.md", warm)


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "examples/tiny_moe/README.md"):
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{name} links to {target}"
