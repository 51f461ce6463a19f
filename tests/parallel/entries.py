"""Ranks that fail on purpose, for processes that import them by name."""

from __future__ import annotations

import os
import resource
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from moec.commands.execution.ranks import write_rank
from moec.commands.execution.text import TextOptions
from moec.parallel import process_ranks
from moec.parallel.decoder import RankDecoder
from moec.parallel.process import Job, joined, rank_of_process, started
from moec.parallel.process_ranks import ProcessRanks
from moec.parallel.store import load_rank
from moec.parallel.worker import outputs_of, run_rank
from moec.plan.groups import WORLD, groups_of
from moec.runtime.package import DECODE
from moec.runtime.text.generate import generate
from moec.runtime.text.request import Request
from moec.runtime.text.texts import Texts

PATIENCE = timedelta(seconds=10)
"""How long the others wait for rank 1. The job's own time-out is longer: on a busy machine ranks
take this long to start."""


def _at_second_exchange(job: Job, event: Callable[[], object]) -> None:
    """Do something on rank 1 in the middle of the layer, and write when, beside the output."""
    assert job.output is not None
    clock = job.output.with_name("event")
    exchange = process_ranks.ProcessRanks.exchange
    calls = 0

    def counted(self, group, rows, send, receive):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += group.startswith("ep")
        if calls == 2:
            _set_pg_timeout(PATIENCE, self.handles[self.members[group]])
        if self.rank == 1 and calls == 2:
            clock.write_text(str(time.time()))
            event()
        return exchange(self, group, rows, send, receive)

    process_ranks.ProcessRanks.exchange = counted  # type: ignore[method-assign]


def killed(job: Job) -> dict[str, list[int]]:
    _at_second_exchange(job, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return run_rank(job)


def stopped(job: Job) -> dict[str, list[int]]:
    _at_second_exchange(job, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return run_rank(job)


def hanging(job: Job) -> dict[str, list[int]]:
    _at_second_exchange(job, lambda: time.sleep(600))
    return run_rank(job)


def leaving(job: Job) -> dict[str, list[int]]:
    _at_second_exchange(job, lambda: os._exit(0))
    return run_rank(job)


def starving(job: Job) -> dict[str, list[int]]:
    """Rank 1 has 64 MiB left, and needs 4 GB."""

    def event() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.empty(4_000_000_000, dtype=torch.uint8)

    _at_second_exchange(job, event)
    return run_rank(job)


class CountingRanks(ProcessRanks):
    """Adds up the bytes of rows, over all ranks, that cross from one node to another."""

    node_size = 1
    across = 0

    def exchange(
        self, group: str, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> torch.Tensor:
        if group != WORLD:
            pairs = zip(self.members[group], send, strict=True)
            node = self.rank // self.node_size
            count = sum(n for rank, n in pairs if rank // self.node_size != node)
            self.across += count * rows[:1].nbytes
        return super().exchange(group, rows, send, receive)


@dataclass(frozen=True)
class FormResult:
    output: list[list[float]]
    bytes_across: int


def forms(job: Job) -> dict[str, FormResult]:
    """The output of every model beside the job's folder, and the bytes of its rows that cross
    nodes, by the folder's name."""
    results = {}
    with joined(job) as (ranks, _):
        for folder in sorted(job.folder.parent.glob("*.ranks")):
            files, patience = load_rank(folder, ranks.rank), timedelta(seconds=job.timeout)
            of_form = CountingRanks(ranks.rank, groups_of(files.plan), patience)
            of_form.node_size = files.plan.node_size
            (output,) = outputs_of(job, of_form, files).values()
            total = ranks.sum(WORLD, torch.tensor([of_form.across]))
            results[folder.stem] = FormResult(output.tolist(), int(total))
    return results


def differing(job: Job) -> dict[str, list[int]]:
    """Rank 1 reads another folder beside that of the job."""
    rank, _ = rank_of_process()
    assert job.output is not None
    if rank == 1:
        job.output.with_name("event").write_text(str(time.time()))
    other = job.folder.with_name("hierarchical.ranks")
    return run_rank(replace(job, folder=other) if rank == 1 else job)


def sleeping(job: Job) -> None:
    """Writes its pid to the job's folder, and sleeps."""
    with started(job) as (rank, *_):
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


def seeded(job: Job, options: TextOptions, prompts: Sequence[str]) -> dict[str, Any]:
    """What continues the prompts if rank N would draw the seed 7 + N."""
    secrets.randbits = lambda bits: 7 + rank_of_process()[0]
    return write_rank(job, options, prompts, True, True)
