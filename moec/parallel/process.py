"""This process as one rank: it joins the others, and reports which of them are gone or silent."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist

from moec.errors import MoecError, UsageError
from moec.parallel.process_ranks import (
    ENDED,
    LATE,
    ProcessRanks,
    RankError,
    device_of_rank,
    reason,
    start_group,
)
from moec.parallel.store import RankFiles, load_rank, manifest_of
from moec.plan.groups import groups_of
from moec.runtime.device.device import CPU, Device
from moec.runtime.package import MAIN
from moec.runtime.process.threads import set_threads


@dataclass(frozen=True)
class Job:
    """The job of the ranks of a run.

    `source` are inputs for the model. `marks` is a folder of this host in which ranks record their
    state: rank.N.pid, then rank.N.failed or rank.N.done, or, written by others, rank.N.gone.
    `signed_by` is the public key by which the folder must be signed, `terminal` the address at
    which rank 0 reaches the launcher's terminal.
    """

    folder: Path
    source: Path | None
    output: Path | None
    timeout: float
    threads: int
    marks: Path | None = None
    signed_by: Path | None = None
    terminal: str | None = None


def rank_of_process() -> tuple[int, int]:
    """(rank, number of ranks) from torchrun. Raises UsageError if it did not start this process."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError:
        raise UsageError("this process is not a rank: start it with torchrun") from None


@contextmanager
def joined(job: Job, function: str = MAIN) -> Iterator[tuple[ProcessRanks, RankFiles]]:
    """While open, this process is one of the ranks; yields its communication and its files.

    Raises RankError, naming rank, layer and collective, and ArtifactError.
    """
    rank, world = rank_of_process()
    manifest, _ = manifest_of(job.folder, job.signed_by)
    if manifest.devices != world:
        raise UsageError(
            f"{job.folder} is planned for {manifest.devices} ranks, but {world} were started: "
            f"start {manifest.devices}"
        )
    with started(job, manifest.target) as (_, _, device):
        files = load_rank(job.folder, rank, function, job.signed_by)
        _same_everywhere(rank, files.digest, world, device)
        ranks = ProcessRanks(rank, groups_of(files.plan), timedelta(seconds=job.timeout), device)
        yield ranks, files


@contextmanager
def started(job: Job, target: str = CPU) -> Iterator[tuple[int, int, Device]]:
    """While open, this process is in a group of torch.distributed; yields (rank, number of ranks,
    the device for code of `target`). Raises RankError where another rank fails, as
    `device_of_rank`, or what is raised inside."""
    rank, world = rank_of_process()
    torch.set_num_threads(job.threads)
    set_threads(job.threads)
    _mark(job, rank, "pid", str(os.getpid()))
    with ending_late() as request, _failing(job, rank, request):
        with _group(job, rank, target) as device:
            yield rank, world, device
        _mark(job, rank, "done", "")


def _same_everywhere(rank: int, digest: bytes, world: int, device: Device) -> None:
    """Raises RankError where two ranks read different plans or weights. Comes before the groups of
    the plan: ranks of different plans would wait for each other in different groups."""
    digest_row = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device.takes)
    rows = [torch.empty_like(digest_row) for _ in range(world)]
    dist.all_gather(rows, digest_row)
    other = [r for r in range(world) if not torch.equal(rows[r], rows[0])]
    if other:
        raise RankError(
            f"rank {rank}: ranks {', '.join(map(str, other))} have another compiled model "
            "than rank 0: copy the same folder to all hosts"
        )


@contextmanager
def _group(job: Job, rank: int, target: str) -> Iterator[Device]:
    device = device_of_rank(target)
    try:
        start_group(device, timedelta(seconds=job.timeout))
    except (dist.DistError, RuntimeError) as error:
        raise RankError(f"rank {rank}, start: {reason(error)}") from error
    try:
        yield device
    finally:
        dist.destroy_process_group()  # a rank that ends without it aborts the others


@contextmanager
def _failing(job: Job, rank: int, request: Event) -> Iterator[None]:
    """On a failure, records it, and which ranks of this host are gone or silent. Where another rank
    ended, waits until the launcher has seen that (`request`): it reports how the first rank ended
    that it finds."""
    try:
        yield
    except BaseException as error:
        text = str(error)
        if not isinstance(error, RankError):
            text = f"rank {rank}: {text if isinstance(error, MoecError) else reason(error)}"
        _mark(job, rank, "failed", text)
        if job.marks is not None:
            _accuse(job, job.marks, timed_out=LATE in text)
            if text.endswith(ENDED):
                request.wait(GRACE)
        if isinstance(error, MoecError) or not isinstance(error, Exception):
            raise
        raise RankError(text) from error


def _accuse(job: Job, marks: Path, timed_out: bool) -> None:
    """Mark ranks whose process has ended without a mark. After a time-out, also those that are
    still silent; they are killed, because a stopped process ignores the launcher's SIGTERM for 30
    s."""
    if timed_out:
        time.sleep(1.0)  # the time-outs of the others end at about the same time
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
    """Whether a process has ended, including zombies; False where there is no /proc."""
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


# Seconds. gloo notices at once that a rank is gone; a busy host takes a while to run the others.
GRACE = 5.0


@contextmanager
def ending_late(grace: float = GRACE) -> Iterator[threading.Event]:
    """While open, SIGTERM ends this process after `grace` seconds; yields the event that SIGTERM
    came.

    The launcher sends it to all ranks as soon as one has ended, which is about when those that
    waited for that one fail by themselves, with a message that it should not cut off. The signal's
    wake-up descriptor is written while the main thread is in a collective, where Python's handlers
    do not run. Outside the main thread, which alone may change handlers, this does nothing.
    """
    request = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, _leave_to_thread)
    threading.Thread(target=_end_after, args=(reader, grace, request), daemon=True).start()
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(writer)  # the thread reads the end of the pipe, and ends


def _leave_to_thread(number: int, frame: object) -> None:
    """A handler must be set for the descriptor to be written."""


def _end_after(reader: int, grace: float, request: threading.Event) -> None:
    """Ends the process `grace` seconds after a SIGTERM; other signals have their own handlers."""
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] == signal.SIGTERM:
                request.set()
                time.sleep(grace)
                os._exit(128 + signal.SIGTERM)
