"""Compiled folders that all tests of a run share, in whichever process they run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessContext

from moec.parallel.save import TextFiles, save_ranks
from moec.passes.parallel.plan_parallelism import rank_programs
from tests.passes.parallel.test_plan_parallelism import model, plan

SOON = 240
"""Seconds, on a machine however busy, from a failure to the end of all ranks: less than every
time-out, so that what was noticed by none of them ends sooner."""
LONGER = 600  # seconds
Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder by name, which the first test that needs it fills."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        path, done = root / f"once-{name}", root / f"once-{name}.done"
        with (root / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                path.mkdir(exist_ok=True)
                fill(path)
                done.touch()
        return path

    return folder


@pytest.fixture
def patient_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's launcher waits `LONGER` for ranks that ignore its signal, not 30 s: what ends before
    was ended by moec."""
    wait = ProcessContext._join_procs_with_timeout
    monkeypatch.setattr(
        ProcessContext, "_join_procs_with_timeout", lambda processes, _: wait(processes, LONGER)
    )


@pytest.fixture(scope="session")
def two_ranks(once: Once) -> Path:
    """One layer on two ranks, of a model that cannot continue text."""

    def fill(path: Path) -> None:
        text = TextFiles(no_generation="its attention is not causal")
        save_ranks(rank_programs(model(), plan(2)), plan(2), path / "m.ranks", text=text)

    return once("two", fill) / "m.ranks"
