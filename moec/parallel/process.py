"""This process as one rank: it joins the others, and says of a failure who was gone or silent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moec.errors import MoecError, UsageError
from moec.parallel.process_ranks import LATE, ProcessRanks, RankError, reason
from moec.parallel.store import RankFiles, load_rank, manifest_of
from moec.plan.groups import WORLD, groups_of
from moec.runtime.package import MAIN


@dataclass(frozen=True)
class Job:
    """What the ranks of a run do: `source` are inputs for the model. `marks` is a folder of this
    host in which ranks say how far they are: rank.N.pid, then rank.N.failed, rank.N.done, or by
    others rank.N.gone. `signed_by` is the public key that must have signed, `terminal` the address
    at which rank 0 reaches the launcher's."""

    folder: Path
    source: Path | None
    output: Path | None
    timeout: float
    threads: int
    marks: Path | None = None
    signed_by: Path | None = None
    terminal: str | None = None


def rank_of_process() -> tuple[int, int]:
    """Rank and number of ranks, as torchrun says. Raises UsageError where it did not start this."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError:
        raise UsageError("this process is no rank: start it with torchrun") from None


@contextmanager
def joined(job: Job, function: str = MAIN) -> Iterator[tuple[ProcessRanks, RankFiles]]:
    """This process among the ranks, and what it runs.

    Raises RankError that names rank, layer and collective, and ArtifactError.
    """
    rank, world = rank_of_process()
    manifest, _ = manifest_of(job.folder, job.signed_by)
    if manifest.devices != world:
        raise UsageError(
            f"{job.folder} is planned for {manifest.devices} ranks, {world} were started"
        )
    with started(job):
        files = load_rank(job.folder, rank, function, job.signed_by)
        ranks = ProcessRanks(rank, groups_of(files.plan), timedelta(seconds=job.timeout))
        _same_everywhere(ranks, files.digest, world)
        yield ranks, files


@contextmanager
def started(job: Job) -> Iterator[tuple[int, int]]:
    """This process's rank and the number of ranks, in a group of torch.distributed. Raises
    RankError where another rank fails, or what is raised inside."""
    from moec.runtime.threads import set_threads

    rank, world = rank_of_process()
    torch.set_num_threads(job.threads)
    set_threads(job.threads)
    _mark(job, rank, "pid", str(os.getpid()))
    with _failing(job, rank), _group(job, rank):
        yield rank, world
        _mark(job, rank, "done", "")


def _same_everywhere(ranks: ProcessRanks, digest: bytes, world: int) -> None:
    """Raises RankError where two ranks read different plans or weights."""
    digest_row = torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None]
    all_of_them = ranks.exchange(WORLD, digest_row.repeat(world, 1), [1] * world, [1] * world)
    other = [r for r in range(world) if not torch.equal(all_of_them[r], all_of_them[0])]
    if other:
        raise RankError(
            f"rank {ranks.rank}: ranks {', '.join(map(str, other))} read another compiled model "
            "than rank 0; copy one folder to all hosts"
        )


@contextmanager
def _group(job: Job, rank: int) -> Iterator[None]:
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=job.timeout))
    except (dist.DistError, RuntimeError) as error:
        raise RankError(f"rank {rank}, start: {reason(error)}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()  # a rank that ends without it aborts the others


@contextmanager
def _failing(job: Job, rank: int) -> Iterator[None]:
    """On a failure: say so, and which ranks of this host are gone or silent."""
    try:
        yield
    except BaseException as error:
        text = str(error) if isinstance(error, MoecError) else f"rank {rank}: {reason(error)}"
        _mark(job, rank, "failed", text)
        if job.marks is not None:
            _accuse(job, job.marks, timed_out=LATE in text)
        if isinstance(error, MoecError) or not isinstance(error, Exception):
            raise
        raise RankError(text) from error


def _accuse(job: Job, marks: Path, timed_out: bool) -> None:
    """Mark ranks whose process has ended without a word. After a time-out also those that are
    still silent: a stopped process ignores the launcher's polite signal for 30 s, so it is killed.
    """
    if timed_out:
        time.sleep(1.0)  # the others' patience ends at about the same time
    for file in marks.glob("rank.*.pid"):
        rank = int(file.name.split(".")[1])
        if any((marks / f"rank.{rank}.{end}").exists() for end in ("failed", "done", "gone")):
            continue
        pid = int(file.read_text())
        if _has_ended(pid):
            _mark(job, rank, "gone", "ended")
        elif timed_out:
            _mark(job, rank, "gone", "did not answer")
            os.kill(pid, signal.SIGKILL)


def _has_ended(pid: int) -> bool:
    """Also of a process that its parent has not looked at yet; False where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _mark(job: Job, rank: int, kind: str, text: str) -> None:
    if job.marks is not None:
        path = job.marks / f"rank.{rank}.{kind}"
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(text)
        new.replace(path)
