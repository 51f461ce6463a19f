"""Ranks that fail on purpose, for processes that import them by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moec.parallel import process_ranks
from moec.parallel.decoder import RankDecoder
from moec.parallel.process import Job, joined, rank_of_process, started
from moec.parallel.store import load_rank
from moec.parallel.worker import run_rank
from moec.runtime.generate import Request, generate
from moec.runtime.package import DECODE
from moec.runtime.texts import Texts


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


def differing(job: Job) -> dict[str, list[int]]:
    """Rank 1 reads the folder beside that of the job."""
    rank, _ = rank_of_process()
    return run_rank(replace(job, folder=job.folder.with_name("other.ranks")) if rank else job)


def sleeping(job: Job) -> None:
    """Writes its pid to the job's folder, and sleeps."""
    with started(job) as (rank, _):
        (job.folder / f"{rank}.pid").write_text(str(os.getpid()))
        time.sleep(600)


def tokens(job: Job, prompts: Sequence[Sequence[int]], request: Request) -> list[list[int]]:
    """What continues each of the prompts."""
    with joined(job, DECODE) as (ranks, files):
        drawn = list(generate(RankDecoder(files, ranks), prompts, request))
    return [list(text) for text in zip(*drawn, strict=True)]


@dataclass(frozen=True)
class Text:
    """What continues each prompt, and the logits after it."""

    tokens: list[list[int]]
    logits: list[list[float]]


def families(job: Job, prompts: Sequence[Sequence[int]], request: Request) -> dict[str, Text]:
    """What continues the prompts, by every model beside the job's folder; by the first also of one
    text."""
    results = {}
    with joined(job, DECODE) as (ranks, first):
        for folder in sorted(job.folder.parent.glob("*.ranks")):
            files = load_rank(folder, ranks.rank, DECODE)
            decoder = RankDecoder(files, ranks)
            logits = Texts(decoder, len(prompts), 8).feed(prompts).tolist()
            drawn = list(generate(decoder, prompts, request))
            results[folder.stem] = Text([list(text) for text in zip(*drawn, strict=True)], logits)
            if files.digest == first.digest:
                drawn = list(generate(decoder, prompts[:1], request))
                tokens = [list(text) for text in zip(*drawn, strict=True)]
                results[f"{folder.stem} alone"] = Text(tokens, [])
    return results
