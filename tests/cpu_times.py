"""CPU seconds of each test, from the start of its set-up to the end of its tear-down.

`--slowest N` prints the largest, `--update-times` records them in tests/times.json: file, test,
seconds. Seconds do not depend on what else the machine does, and those of processes that a test
starts count. What a fixture of a module or of the session took, or a call of a function with
`@cache`, is divided among the tests that need it: otherwise it would count for the first of them,
and for the next one where that is left out.
"""

from __future__ import annotations

import functools
import json
import os
import resource
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

SMALLEST = 0.1
"""Seconds. Tests below are not recorded, which keeps the file and its changes short."""
TOLERANCE = 0.25
"""A recorded time stays until the measured one differs by more than this part of it."""
PROPERTY = "cpu_seconds"
"""The property of a report that has a Measurement, as a dict."""

Seconds = Mapping[str, float]
"""CPU seconds by the id of the test: tests/api/test_quant.py::test_formats[int8]."""


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


def write_times(path: Path, seconds: Seconds) -> None:
    files: dict[str, dict[str, float]] = {}
    for name in sorted(seconds):
        if seconds[name] >= SMALLEST:
            file, _, test = name.partition("::")
            files.setdefault(file, {})[test] = seconds[name]
    text = json.dumps(files, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def update_times(recorded: Seconds, measured: Seconds) -> dict[str, float]:
    """The measured times; where they hardly differ, as recorded, so that few lines change."""
    return {
        name: recorded[name]
        if name in recorded and abs(seconds - recorded[name]) <= TOLERANCE * recorded[name]
        else float(f"{seconds:.2g}")
        for name, seconds in measured.items()
    }


@dataclass(frozen=True)
class Measurement:
    """Of one test: CPU seconds in all, those of each shared set-up that ran in it, and the names of
    all shared set-ups that it needs."""

    total: float
    costs: dict[str, float]
    set_ups: list[str]


def divide_set_ups(measurements: Mapping[str, Measurement]) -> dict[str, float]:
    """Seconds by test: what it took without shared set-ups, and an equal part of each that it
    needs. Where several processes ran a set-up, all its runs are divided."""
    costs: Counter[str] = Counter()
    users: Counter[str] = Counter()
    for measurement in measurements.values():
        costs.update(measurement.costs)
        users.update(measurement.set_ups)
    return {
        name: measurement.total
        - sum(measurement.costs.values())
        + sum(costs[set_up] / users[set_up] for set_up in measurement.set_ups)
        for name, measurement in measurements.items()
    }


class CpuTimes:
    """Measures in each process; reports bring the seconds to the process that prints and writes."""

    def __init__(self) -> None:
        self._measurements: dict[str, Measurement] = {}
        self._start = 0.0
        self._costs: dict[str, float] = {}
        """Seconds of the shared set-ups that ran in the present test."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        self._start = cpu_seconds()
        self._costs = {}
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function":
            return (yield)
        with self._measured(set_up_name(fixturedef, request._pyfuncitem)):
            return (yield)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for module in {item.module for item in session.items if isinstance(item, pytest.Function)}:
            for name, value in list(vars(module).items()):
                if is_preparation(value):
                    setattr(module, name, self._measured_calls(value))

    def _measured_calls(self, cached: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(cached)
        def call(*args: Any, **options: Any) -> Any:
            key = hash((args, tuple(options.items())))
            with self._measured(f"{cached.__module__}.{cached.__qualname__} {key}"):
                return cached(*args, **options)

        return call

    @contextmanager
    def _measured(self, set_up: str) -> Iterator[None]:
        """A set-up can run others; each counts once."""
        start, inner = cpu_seconds(), sum(self._costs.values())
        try:
            yield
        finally:
            inner = sum(self._costs.values()) - inner
            spent = cpu_seconds() - start - inner
            self._costs[set_up] = self._costs.get(set_up, 0.0) + spent

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            set_ups = sorted({*self._costs, *list_set_ups(item)})
            measurement = Measurement(cpu_seconds() - self._start, self._costs, set_ups)
            report.user_properties.append((PROPERTY, asdict(measurement)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            content: Any = dict(report.user_properties)[PROPERTY]
            self._measurements[report.nodeid] = Measurement(**content)

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        count = config.getoption("--slowest")
        if count:
            terminalreporter.section(f"slowest {count} tests, in CPU seconds")
            for line in list_slowest(divide_set_ups(self._measurements), count):
                terminalreporter.write_line(line)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """What is recorded of tests that did not run stays, unless all ran: then they have gone."""
        config = session.config
        if config.getoption("--update-times") and not hasattr(config, "workerinput"):
            recorded = read_times(path := times_file(config))
            others = {} if runs_all(config) and exitstatus == pytest.ExitCode.OK else recorded
            measured = divide_set_ups(self._measurements)
            write_times(path, {**others, **update_times(recorded, measured)})


def is_preparation(value: object) -> bool:
    """A function with `@cache` of a test module. One of moec, or one with a bound, is part of what
    is tested."""
    return (
        isinstance(value, functools._lru_cache_wrapper)
        and value.__module__.startswith("test")
        and value.cache_parameters()["maxsize"] is None
    )


def list_set_ups(item: pytest.Item) -> list[str]:
    """The names of the shared set-ups that a test needs."""
    names: list[str] = getattr(item, "fixturenames", [])
    return [
        set_up_name(fixture[-1], item)
        for name in names
        if (fixture := item._fixtureinfo.name2fixturedefs.get(name))  # type: ignore[attr-defined]
        and fixture[-1].scope != "function"
    ]


def set_up_name(fixture: pytest.FixtureDef[Any], item: pytest.Item) -> str:
    """With the number of its parameter, where it has several."""
    indices: dict[str, int] = item.callspec.indices if hasattr(item, "callspec") else {}
    return f"{fixture.baseid}::{fixture.argname}[{indices.get(fixture.argname, '')}]"


def list_slowest(measured: Seconds, count: int) -> list[str]:
    """The slowest tests, one a line, and the sum of all."""
    first = sorted(measured.items(), key=lambda pair: -pair[1])[:count]
    lines = [f"{seconds:8.1f}  {name}" for name, seconds in first]
    return [*lines, f"{sum(measured.values()):8.1f}  all {len(measured):,} tests"]


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
