"""Compiled folders that all tests of a run share, in whichever process they run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.parallel.save import TextFiles, save_ranks
from moec.passes.parallel.plan_parallelism import rank_programs
from tests.passes.parallel.test_plan_parallelism import model, plan

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


@pytest.fixture(scope="session")
def two_ranks(once: Once) -> Path:
    """One layer on two ranks, of a model that cannot continue text."""

    def fill(path: Path) -> None:
        text = TextFiles(no_generation="its attention is not causal")
        save_ranks(rank_programs(model(), plan(2)), plan(2), path / "m.ranks", text=text)

    return once("two", fill) / "m.ranks"
