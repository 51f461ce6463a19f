"""CPU seconds of tests, and the tiers that they make, in a suite of five tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiers
from tests.cpu_times import cpu_seconds, read_times, write_times

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
BUSY = "import time\nwhile time.process_time() < 0.4: pass"
SUITE = f"""
import subprocess, sys

def test_quick(): pass
def test_new(): pass
def test_slow(): pass
def test_smoke(): pass

def test_starts_python(): subprocess.run([sys.executable, "-c", {BUSY!r}], check=True)
"""
RECORDED = {"tests/test_it.py": {"test_quick": 0.3, "test_slow": 0.5, "test_smoke": 20.0}}
FAST = ["test_smoke", "test_quick", "test_new", "test_starts_python"]


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Five tests, three of which have recorded times."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini("[pytest]\ntestpaths = tests\n")
    (pytester.path / "tests").mkdir()
    (pytester.path / "tests" / "test_it.py").write_text(SUITE, encoding="utf-8")
    times = pytester.path / "tests" / "times.json"
    times.write_text(json.dumps(RECORDED), encoding="utf-8")
    return pytester


PLUGINS = ("-p", "tests.cpu_times", "-p", "tests.tiers", "-p", "no:cacheprovider", "-v")


def run(suite: pytest.Pytester, *options: str) -> pytest.RunResult:
    return suite.runpytest_inprocess(*PLUGINS, *options)


def names(result: pytest.RunResult) -> list[str]:
    """The tests that ran, in order."""
    return [line.split("::")[1].split()[0] for line in result.outlines if " PASSED" in line]


def test_the_fast_tier_has_fast_tests_new_ones_and_smokes(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smoke took more than ten seconds, so it is first."""
    monkeypatch.setattr(tiers, "SMOKES", {"a door": "tests/test_it.py::test_smoke"})
    result = run(suite, "--tier", "fast")
    assert names(result) == FAST
    result.stdout.fnmatch_lines(["1 of 5 tests left out: `make test-all` runs them"])
    assert result.outlines[-1].startswith("=")


def test_the_rest_is_what_the_fast_tier_leaves_out(suite: pytest.Pytester) -> None:
    result = run(suite, "--tier", "rest")
    assert names(result) == ["test_smoke", "test_slow"]
    result.stdout.fnmatch_lines(["3 of 5 tests left out: `make test` runs them"])


def test_what_is_for_the_night_is_left_out_by_day(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "NIGHTLY", {"tests/test_it.py": 0.4})
    assert names(run(suite, "--tier", "nightly")) == ["test_smoke", "test_slow"]
    assert names(run(suite, "--tier", "rest")) == []
    assert names(run(suite, "--tier", "all")) == ["test_quick", "test_new", "test_starts_python"]


def test_every_door_has_its_smoke() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *tiers.SMOKES.values()], capture_output=True, text=True, cwd=ROOT
    )
    collected = [line for line in result.stdout.splitlines() if "::" in line]
    assert sorted(collected) == sorted(tiers.SMOKES.values()), result.stderr


def test_times_of_a_child_are_printed_and_recorded(suite: pytest.Pytester) -> None:
    """Of a run of all tests; those below 0.1 s are not in the file."""
    result = run(suite, "--update-times", "--slowest", "2")
    result.stdout.fnmatch_lines(
        ["*slowest 2 tests, in CPU seconds*", "*0.*tests/test_it.py::test_starts_python"]
    )
    result.stdout.fnmatch_lines(["*all 5 tests"])
    result.stdout.no_fnmatch_line("*left out*")
    [(name, seconds)] = read_times(suite.path / "tests" / "times.json").items()
    assert name == "tests/test_it.py::test_starts_python"
    assert 0.4 <= seconds < 4  # the start of Python, however busy the machine


@pytest.mark.parametrize(
    "part", [("--tier", "fast"), ("-k", "python"), ("tests/test_it.py::test_starts_python",)]
)
def test_a_part_records_its_tests_alone(suite: pytest.Pytester, part: tuple[str, ...]) -> None:
    run(suite, "--update-times", *part)
    recorded = read_times(suite.path / "tests" / "times.json")
    assert recorded["tests/test_it.py::test_slow"] == 0.5
    assert recorded["tests/test_it.py::test_starts_python"] >= 0.4


def test_two_processes_count_and_measure_the_same(suite: pytest.Pytester) -> None:
    options = ("-n", "2", "--tier", "fast", "--slowest", "1", "--update-times")
    result = suite.runpytest_subprocess(*PLUGINS, *options)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*0.*::test_starts_python", "*all 3 tests"])
    result.stdout.fnmatch_lines(["2 of 5 tests left out: `make test-all` runs them"])
    assert read_times(suite.path / "tests" / "times.json")["tests/test_it.py::test_slow"] == 0.5


def test_the_file_is_sorted_by_file_and_test(tmp_path: Path) -> None:
    seconds = {"b.py::test[a::b]": 1.24, "a.py::test_2": 0.1, "a.py::test_1": 3.0, "a.py::no": 0.09}
    write_times(path := tmp_path / "times.json", seconds)
    assert path.read_text(encoding="utf-8").split() == (
        '{ "a.py": { "test_1": 3.0, "test_2": 0.1 }, "b.py": { "test[a::b]": 1.0 } }'.split()
    )
    assert list(read_times(path)) == ["a.py::test_1", "a.py::test_2", "b.py::test[a::b]"]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_process_that_goes_on_counts() -> None:
    """So that a test counts what it runs in forks of the process of tests/fresh.py."""
    program = f"{BUSY}\nprint(flush=True)\ninput()"
    before = cpu_seconds()
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running = cpu_seconds() - before
        child.communicate(b"\n")
    assert 0.35 <= running <= cpu_seconds() - before  # /proc counts hundredths
