"""Ranks that fail on purpose, for processes that are started by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from moec.parallel import process_ranks
from moec.parallel.worker import Job, run_rank


def _at_second_exchange(event: Callable[[], None]) -> None:
    """Do something on rank 1 in the middle of the layer."""
    exchange = process_ranks.ProcessRanks.exchange
    calls = 0

    def counted(self, group, rows, send, receive):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += group.startswith("ep")
        if self.rank == 1 and calls == 2:
            event()
        return exchange(self, group, rows, send, receive)

    process_ranks.ProcessRanks.exchange = counted  # type: ignore[method-assign]


def killed(job: Job) -> dict[str, list[int]]:
    _at_second_exchange(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return run_rank(job)


def stopped(job: Job) -> dict[str, list[int]]:
    _at_second_exchange(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return run_rank(job)


def hanging(job: Job) -> dict[str, list[int]]:
    _at_second_exchange(lambda: time.sleep(600))
    return run_rank(job)


def leaving(job: Job) -> dict[str, list[int]]:
    _at_second_exchange(lambda: os._exit(0))
    return run_rank(job)


def raising(job: Job) -> dict[str, list[int]]:
    def event() -> None:
        raise MemoryError("too little memory")

    _at_second_exchange(event)
    return run_rank(job)
