"""Progress: plain lines as phases start, a live list on a terminal, nothing when quiet."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from moec.commands.output.progress import BEFORE_CODE, COMPILE, Progress, about


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking() -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += 1.5


def test_plain_lines_are_written_as_phases_start() -> None:
    out, times = io.StringIO(), ticking()
    with Progress(stream=out, clock=lambda: next(times)) as progress:
        progress.phase("capture")
        progress.phase("kernels")
        progress.phase("kernels 3/24")
        progress.phase("link")
    assert out.getvalue().splitlines() == [
        "[    1.5 s] capture",
        "[    3.0 s] kernels",
        "[    6.0 s] link",
        "[    7.5 s] done",
    ]
    assert progress.times() == {"capture": 1.5, "kernels": 3.0, "link": 1.5}


def test_without_a_terminal_a_long_phase_goes_on_speaking() -> None:
    out, spoken = io.StringIO(), threading.Event()
    out.flush = spoken.set  # type: ignore[method-assign]
    with Progress(stream=out, clock=lambda: 2.0, period=0.01, plan={"verify": 1.0}) as progress:
        progress.phase("verify")
        record = {"detail": "search for a wrong pass, after fuse-gate"}
        logging.getLogger("moec.verify.check").debug("verify", extra=record)
        spoken.clear()
        assert spoken.wait(10)
    *_, line, last = out.getvalue().splitlines()
    assert line == "[    0.0 s  0 %] verify search for a wrong pass, after fuse-gate"
    assert last.endswith("done")


def test_a_quiet_command_does_not_speak() -> None:
    out = io.StringIO()
    with Progress(True, out, period=0.01) as progress:
        progress.phase("verify")
        time.sleep(0.1)
    assert out.getvalue() == ""


PLAN = {"capture": 10.0, "kernels": 20.0, "save": 10.0}


def test_how_much_is_done_and_how_long_the_rest_takes() -> None:
    out, now = io.StringIO(), [0.0]
    with Progress(stream=out, clock=lambda: now[0], plan=PLAN) as progress:
        progress.phase("capture")
        now[0] = 2.0
        assert progress.outlook(now[0]) == "5 %"  # 2 of 40 s; too early for more
        now[0] = 20.0  # twice what was expected
        progress.phase("kernels")
        assert progress.outlook(now[0]) == "25 %, about 60 s left"
        now[0] = 30.0  # of 40 that are now expected of this phase
        assert progress.outlook(now[0]) == "38 %, about 50 s left"
        record = {"share": 0.9, "detail": "9/10 to LLVM"}
        logging.getLogger("moec.codegen.object_cache").debug("kernels", extra=record)
        assert progress.outlook(now[0]) == "70 %, about 13 s left"
        assert progress.phases[-1].detail == "9/10 to LLVM"
        now[0] = 230.0
        progress.phase("save")
        assert progress.outlook(now[0]) == "75 %, about 77 s left"
    assert out.getvalue().splitlines() == [
        "[    0.0 s  0 %] capture",
        "[   20.0 s  25 %, about 60 s left] kernels",
        "[  230.0 s  75 %, about 77 s left] save",
        "[  230.0 s] done",
    ]
    assert logging.getLogger("moec").level == logging.NOTSET


def test_long_times_are_minutes() -> None:
    assert [about(7.6), about(99), about(101), about(7200)] == ["8 s", "99 s", "2 min", "120 min"]


def test_a_phase_that_takes_too_long_is_never_done() -> None:
    progress = Progress(quiet=True, clock=lambda: 0.0, plan=PLAN)
    with progress:
        progress.phase("capture")
        assert progress.fraction(1e6) == pytest.approx(0.9 * 10 / 40)


def test_the_plan_of_a_compilation_has_its_phases() -> None:
    assert {*BEFORE_CODE} < {*COMPILE}


def test_a_failure_names_its_phase() -> None:
    out, times = io.StringIO(), ticking()

    def work() -> None:
        with Progress(stream=out, clock=lambda: next(times)) as progress:
            progress.phase("pack")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert out.getvalue().splitlines()[-1] == "[    3.0 s] failed in pack"


def test_quiet_writes_nothing() -> None:
    out = Terminal()
    with Progress(quiet=True, stream=out) as progress:
        progress.phase("capture")
    assert out.getvalue() == ""
    assert "capture" in progress.times()


def test_a_terminal_shows_every_phase_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, times = Terminal(), ticking()
    with Progress(stream=out, clock=lambda: next(times)) as progress:
        progress.phase("capture")
        progress.phase("link 2/5")
    shown = out.getvalue()
    assert "capture" in shown
    assert "link" in shown
    assert "\x1b[" in shown


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress(stream=out) as progress:
        progress.phase("capture")
    assert "\x1b" not in out.getvalue()
    assert "capture" in out.getvalue()
