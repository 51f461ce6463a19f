"""A rank that the launcher ends first says where it waited."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from moec.parallel.process import ending_late

FORK = multiprocessing.get_context("forkserver")
GRACE = 1.0


def waiting(ready: Path, seconds: float) -> None:
    """As a rank whose collective fails some time after the launcher ends it."""
    with ending_late(GRACE):
        ready.write_text("")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        ready.with_name("message").write_text("failed by itself")
    sys.exit(7)


@pytest.mark.parametrize(("seconds", "code"), [(0.3, 7), (600.0, 128 + signal.SIGTERM)])
def test_a_signal_ends_a_rank_after_a_moment(seconds: float, code: int, tmp_path: Path) -> None:
    rank = FORK.Process(target=waiting, args=(tmp_path / "ready", seconds))
    rank.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert rank.pid is not None
    os.kill(rank.pid, signal.SIGTERM)
    rank.join(60)
    assert rank.exitcode == code
    assert (tmp_path / "message").exists() == (code == 7)


def test_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending_late(GRACE) as request:
        assert not request.is_set()
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
