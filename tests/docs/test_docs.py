"""Generated pages are up to date, and the code of the other pages runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.catalogue import PAGES
from docs.pictures import PICTURE, picture
from moec import cache
from moec.ir.ops import OPS
from moec.oracle import rounding, tolerance
from moec.pipeline import OPT_IN, all_passes
from moec.runtime.artifact import manifest
from tests.fresh import Program, Warm
from tests.pages import ROOT, Block, blocks

DOCS = ROOT / "docs"


def script(page: str) -> Block | None:
    """All Python blocks of a page as one script; lines count from the page's first."""
    text = ""
    for block in blocks((DOCS / page).read_text(encoding="utf-8")):
        if block.kind == "python":
            text += "\n" * (block.line - text.count("\n")) + block.text
    return Block("python", text, 1) if text else None


WITH_CODE = [page.name for page in sorted(DOCS.glob("*.md")) if script(page.name)]


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_tables_are_up_to_date(page):
    assert (DOCS / page).read_text(encoding="utf-8") == PAGES[page](), "run make pages"


def test_the_picture_is_up_to_date():
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run make pages"


def test_the_picture_names_every_pass():
    svg = picture()
    assert [p.name for p in (*all_passes(), *OPT_IN) if f">{p.name}</text>" not in svg] == []


def test_every_op_has_a_section():
    page = PAGES["ops.md"]()
    assert [name for name in OPS if f"### {name}\n" not in page] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r"[\w-]+\.md", navigation))


def test_files_that_pages_name_exist():
    """Paths in backticks that begin with a folder of the repository."""
    folders = r"(?:moec|passes|codegen|runtime|tests|examples|benchmarks|docs)/"
    missing = [
        f"{page.name}: {name}"
        for page in (*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
        for name in re.findall(rf"`({folders}[\w./-]+)`", page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert missing == []


def test_names_that_the_map_gives_are_in_their_files():
    """`file` (`name`): the file defines the function, class or table."""
    pairs = re.findall(r"`([\w./]+)`\s+\(`(\w+)`\)", (DOCS / "architecture.md").read_text("utf-8"))
    form = r"(?m)^\s*(?:async )?(?:def|class|static .*\b) ?\*?{0}\b|^{0} *[=:]"
    assert len(pairs) > 40
    assert [
        pair for pair in pairs if not re.search(form.format(pair[1]), (ROOT / pair[0]).read_text())
    ] == []


def text_of(page: str) -> str:
    return " ".join((DOCS / page).read_text(encoding="utf-8").split())


def scientific(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def test_the_page_of_artifacts_has_their_format():
    assert f"The format's version is {manifest.FORMAT};" in text_of("artifact.md")


def test_the_page_of_verification_has_the_tolerances():
    page = text_of("verification.md")
    for row in (
        f"| f64, f32 | {scientific(tolerance.TOLERANCES['f32'])} |",
        f"| f16, in captures | {scientific(tolerance.TOLERANCES['f16'])} |",
        f"| bf16, in captures | {scientific(tolerance.TOLERANCES['bf16'])} |",
        f"| {scientific(tolerance.QUANTISED)}, or the dtype's",
        f"| {scientific(tolerance.EXACT_ROWS)} | every term",
        f"may have {rounding.FACTOR} times",
    ):
        assert row in page


def test_the_page_of_the_cache_names_its_kinds_and_variables():
    page = text_of("cache.md")
    assert all(f"`{kind}/KEY`" in page for kind in cache.KINDS)
    assert f"in GiB, {cache.DEFAULT_LIMIT // 2**30} by default" in page


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, warm: Warm) -> None:
    block = script(page)
    assert block is not None
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = warm.run(Program(block.text, strict=True), tmp_path)
    assert result.returncode == 0, f"docs/{page}\n{result.stderr}"
