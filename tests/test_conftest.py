"""The golden fixture: a difference fails, a missing file fails, --update-golden writes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ONE_TEST = "def test_text(golden):\n    golden({text!r})\n"


@pytest.fixture
def project(pytester):
    """A folder with this suite's conftest and one test, tests/passes/test_it.py."""
    folder = pytester.path / "tests" / "passes"
    folder.mkdir(parents=True)
    conftest = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    (folder.parent / "conftest.py").write_text(conftest, encoding="utf-8")

    def run(text, *options):
        (folder / "test_it.py").write_text(ONE_TEST.format(text=text), encoding="utf-8")
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "tests", *options)

    return run


def test_golden(project, pytester):
    missing = project("a\nb")
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*golden/passes/test_it/test_text.txt is missing*"])
    project("a\nb", "--update-golden").assert_outcomes(passed=1)
    golden = pytester.path / "tests" / "golden" / "passes" / "test_it" / "test_text.txt"
    assert golden.read_text() == "a\nb\n"
    project("a\nb").assert_outcomes(passed=1)
    changed = project("a\nc")
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(["*differs from tests/golden/passes/test_it/test_text.txt*"])
    assert golden.read_text() == "a\nb\n"


def test_a_deadlock_ends(pytester):
    lines = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    limits = [line for line in lines if line.startswith("timeout")]
    assert limits[0] == "timeout = 600"
    pytester.makepyprojecttoml("\n".join(["[tool.pytest.ini_options]", "timeout = 1", *limits[1:]]))
    pytester.makepyfile(
        "import threading\n\ndef test_lock():\n    lock = threading.Lock()\n"
        "    lock.acquire()\n    lock.acquire()\n"
    )
    result = pytester.runpytest_subprocess()
    assert result.ret != 0
    assert "Timeout" in (words := result.stdout.str() + result.stderr.str())
    assert "in test_lock" in words
