"""A compiled folder that all tests of a run share, and a launcher that waits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.multiprocessing import ProcessContext

from moec.parallel.build import TextFiles, save_ranks
from moec.passes.parallel.plan_parallelism import rank_programs
from tests.once import Once
from tests.passes.parallel.test_plan_parallelism import model, plan

SOON = 240
"""Seconds, on a machine however busy, from a failure to the end of all ranks: less than every
time-out, so that what was noticed by none of them ends sooner."""
LONGER = 600  # seconds


def method_name(depth: int = 2) -> str:
    """The name of the function `depth` calls above."""
    return sys._getframe(depth).f_code.co_name


@pytest.fixture(scope="session", autouse=True)
def _short_stacks() -> Iterator[None]:
    """torch's launcher names the method of each of its events by `inspect.stack`, twice, which
    looks for the source of every frame in every imported module: of these a test run has
    thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_rendezvous, "get_method_name", method_name)
        yield


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
