"""Progress: plain lines as phases start, a live list on a terminal, nothing when quiet."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from moec.commands.progress import Progress


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
