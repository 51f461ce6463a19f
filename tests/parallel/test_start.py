"""Ranks that cannot connect, and Ctrl-C: one message, and no process left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moec.errors import UsageError
from moec.parallel.launch import launch
from moec.parallel.process import Job, joined, started
from moec.parallel.process_ranks import RankError
from tests.parallel import entries
from tests.parallel.conftest import SOON
from tests.parallel.test_launch import free_port, saved

__all__ = ["saved"]  # a fixture

INTERRUPTED = """
import sys
from pathlib import Path
from moec.parallel.launch import start
from moec.parallel.process import Job
from tests.parallel.entries import sleeping
start(Job(Path(sys.argv[1]), None, None, 300.0, 1), 2, sleeping)
"""


@contextmanager
def soon() -> Iterator[None]:
    """The block ends within `SOON`."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, port: int) -> None:
    names = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        as_rank(monkeypatch, 0, 2, port)
        message = f"^rank 0, start: port {port} is in use: choose another"
        job = Job(tmp_path, None, None, 300.0, 1)
        with soon(), pytest.raises(RankError, match=message), started(job):
            pass


def test_a_rank_that_was_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    as_rank(monkeypatch, 0, 2, free_port())
    message = "^rank 0, start: another rank did not respond in time: 1 of 2 were started"
    job = Job(tmp_path, None, None, 1.0, 1)
    with soon(), pytest.raises(RankError, match=message), started(job):
        pass


def test_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch, two_ranks: Path) -> None:
    job = Job(two_ranks, None, None, 300.0, 1)
    as_rank(monkeypatch, 0, 3, free_port())
    message = "planned for 2 ranks, but 3 were started"
    with soon(), pytest.raises(UsageError, match=message), joined(job):
        pass


def test_no_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RANK", raising=False)
    message = "this process is not a rank: start it with torchrun"
    with pytest.raises(UsageError, match=message), started(Job(tmp_path, None, None, 1.0, 1)):
        pass


def test_another_model_on_another_rank(saved: Path, tmp_path: Path) -> None:
    """Also of another plan, whose groups of ranks are others."""
    job = Job(saved / "flat.ranks", None, tmp_path / "out.npz", 300.0, 1)
    message = "rank [0-3]: ranks 1 have another compiled model than rank 0: copy the same folder"
    with pytest.raises(RankError, match=message):
        launch(job, 4, entries.differing)
    assert time.time() - float((tmp_path / "event").read_text()) < SOON


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(),
    reason="looks for processes in /proc",
)
def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to all of a session's foreground
    )
    try:
        files = [tmp_path / f"{rank}.pid" for rank in range(2)]
        limit = time.monotonic() + 240
        while not all(file.exists() and file.read_text() for file in files):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, text = process.communicate(timeout=SOON)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert text.strip().endswith("KeyboardInterrupt")
    assert not any(Path(f"/proc/{file.read_text()}").exists() for file in files)
