"""One rank as a process: its part of the inputs in, the outputs of all on rank 0."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from moec.errors import MoecError, UsageError
from moec.parallel.process_ranks import LATE, ProcessRanks, RankError, named_meanings, reason
from moec.parallel.segments import RankModel
from moec.parallel.store import load_rank, manifest_of
from moec.plan.groups import groups_of

WORLD = "world"


@dataclass(frozen=True)
class Job:
    """What the ranks of a run do. `marks` is a folder of this host in which ranks say how far they
    are: rank.N.pid, then rank.N.failed, rank.N.done, or by others rank.N.gone."""

    folder: Path
    source: Path
    output: Path | None
    timeout: float
    threads: int
    marks: Path | None = None


def rank_of_process() -> tuple[int, int]:
    """Rank and number of ranks, as torchrun says."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def run_rank(job: Job) -> dict[str, list[int]]:
    """Run this process's rank; the outputs' shapes on rank 0.

    Raises RankError that names rank, layer and collective, ArtifactError and InputError.
    """
    rank, world = rank_of_process()
    torch.set_num_threads(job.threads)
    _mark(job, rank, "pid", str(os.getpid()))
    manifest, _ = manifest_of(job.folder)
    if manifest.devices != world:
        raise UsageError(
            f"{job.folder} is planned for {manifest.devices} ranks, {world} were started"
        )
    with _failing(job, rank), _group(job, rank):
        shapes = _run(job, rank, world)
        _mark(job, rank, "done", "")
        return shapes


def _run(job: Job, rank: int, world: int) -> dict[str, list[int]]:
    from moec.runtime.tensor_files import write_tensors
    from moec.runtime.threads import set_threads
    from moec.target import cpu

    set_threads(job.threads)
    files = load_rank(job.folder, rank)
    groups = {**groups_of(files.plan), WORLD: (tuple(range(world)),)}
    ranks = ProcessRanks(rank, groups, timedelta(seconds=job.timeout))
    _same_everywhere(ranks, files.digest, world)
    model = RankModel(files.program, cpu.host())
    inputs = _inputs(job.source, [v.name for v in files.program.graph.inputs], rank, world)
    results = model(inputs, named_meanings(ranks))
    names = [value.name for value in files.program.graph.outputs]
    outputs = {
        name: _on_first(ranks, tensor, world) for name, tensor in zip(names, results, strict=True)
    }
    if rank == 0 and job.output is not None:
        arrays = {n: t.float().numpy() if t.dtype is torch.bfloat16 else t.numpy()
                  for n, t in outputs.items()}  # fmt: skip
        write_tensors(job.output, arrays)
    return {name: list(tensor.shape) for name, tensor in outputs.items()} if rank == 0 else {}


def _inputs(source: Path, names: list[str], rank: int, world: int) -> list[torch.Tensor]:
    """This rank's share of every input along its first axis. Raises UsageError."""
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file}
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: {error}") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UsageError(f"{source} lacks {', '.join(missing)}; the model takes {', '.join(names)}")
    lengths = {arrays[name].shape[:1] for name in names}
    if len(lengths) != 1 or lengths == {()}:
        raise UsageError(f"{source}: inputs have different first axes, and ranks share these")
    return [torch.from_numpy(np.array_split(arrays[name], world)[rank]) for name in names]


def _on_first(ranks: ProcessRanks, tensor: torch.Tensor, world: int) -> torch.Tensor:
    """All ranks' rows on rank 0, none on the others."""
    count = torch.full((world,), 0, dtype=torch.int64)
    count[0] = len(tensor)
    ones = [1] * world
    arriving = ranks.exchange(WORLD, count, ones, ones).tolist()
    return ranks.exchange(WORLD, tensor, count.tolist(), arriving)


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
