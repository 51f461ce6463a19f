"""CPU seconds of each test, from the start of its set-up to the end of its tear-down.

`--slowest N` prints the largest, `--update-times` records them in tests/times.json: file, test,
seconds. Seconds do not depend on what else the machine does, and those of processes that a test
starts count. What tests share counts for the first of them.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

SMALLEST = 0.1
"""Seconds. Tests below are not recorded, which keeps the file and its changes short."""


def cpu_seconds() -> float:
    """User and system time of this process, of its children that have ended, and, on Linux, of
    those that its main thread started and that still run, with their children that have ended."""
    usages = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    running = Path(f"/proc/self/task/{os.getpid()}/children")
    children = running.read_text().split() if running.exists() else []
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + sum(map(_seconds, children))


def _seconds(child: str) -> float:
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # another thread has waited for it
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def times_file(config: pytest.Config) -> Path:
    return config.rootpath / "tests" / "times.json"


def read_times(path: Path) -> dict[str, float]:
    """What is recorded. A test that is not in the file took less than SMALLEST, or is new."""
    if not path.exists():
        return {}
    files: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return {f"{file}::{test}": t for file, tests in files.items() for test, t in tests.items()}


def write_times(path: Path, seconds: Mapping[str, float]) -> None:
    """One digit of each, so that few lines change."""
    files: dict[str, dict[str, float]] = {}
    for name in sorted(seconds):
        if seconds[name] >= SMALLEST:
            file, _, test = name.partition("::")
            files.setdefault(file, {})[test] = float(f"{seconds[name]:.1g}")
    text = json.dumps(files, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


class CpuTimes:
    """Measures in each process; reports bring the seconds to the process that prints and writes."""

    def __init__(self) -> None:
        self._measured: dict[str, float] = {}
        self._start = 0.0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        self._start = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            report.user_properties.append(("cpu_seconds", cpu_seconds() - self._start))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self._measured[report.nodeid] = float(str(dict(report.user_properties)["cpu_seconds"]))

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        count = config.getoption("--slowest")
        if count:
            terminalreporter.section(f"slowest {count} tests, in CPU seconds")
            first = sorted(self._measured.items(), key=lambda pair: -pair[1])[:count]
            total = f"all {len(self._measured):,} tests"
            for name, seconds in (*first, (total, sum(self._measured.values()))):
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """What is recorded of tests that did not run stays, unless all ran: then they have gone."""
        config = session.config
        if config.getoption("--update-times") and not hasattr(config, "workerinput"):
            path, all_ran = (
                times_file(config),
                runs_all(config) and exitstatus == pytest.ExitCode.OK,
            )
            others = {} if all_ran else read_times(path)
            write_times(path, {**others, **self._measured})


def runs_all(config: pytest.Config) -> bool:
    """Whether no option or argument leaves a test out."""
    parts = ("--tier", "keyword", "markexpr", "deselect", "lf")
    chosen = any(config.getoption(part, None) for part in parts)
    return not chosen and config.args == config.getini("testpaths")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slowest", type=int, metavar="N", help="print the N slowest tests")
    parser.addoption(
        "--update-times", action="store_true", help="record CPU seconds in tests/times.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuTimes(), "moec-cpu-times")
