"""Starts all ranks of a plan on this host, and reports which one failed, where and why."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from moec.parallel.process import Job
from moec.parallel.process_ranks import ENDED, LATE, RankError
from moec.parallel.store import manifest_of

T = TypeVar("T")

# One process imports these, which takes seconds, and ranks are forked from it. It has no threads,
# and is kept for further launches.
PRELOADED = ["moec.parallel.worker", "torch.distributed.elastic.multiprocessing"]
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def launch(job: Job, count: int, entry: Callable[..., T], *arguments: Any) -> T:
    """Run `entry(job, *arguments)` in `count` processes, one per rank; returns the result of rank
    0.

    Raises RankError with the rank that failed first, how it ended, and where the others were.
    """
    manifest, _ = manifest_of(job.folder, job.signed_by)
    if manifest.devices != count:
        raise RankError(f"{job.folder} is planned for {manifest.devices} ranks, not {count}")
    return start(job, count, entry, *arguments)


def start(job: Job, count: int, entry: Callable[..., T], *arguments: Any) -> T:
    """As `launch`, without a plan's folder. Raises RankError."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if START == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="moec-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method=START,
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder, "logs"))),
        )
        marked = replace(job, marks=Path(folder))
        for name in ("torch.distributed.elastic", "torch.multiprocessing"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the error has it in one line
        try:
            results: dict[int, T] = elastic_launch(config, run_entry)(entry, marked, *arguments)
        except SignalException as stopped:  # the launcher has ended the ranks
            if stopped.sigval is signal.SIGINT:
                raise KeyboardInterrupt from None
            raise RankError(f"the ranks were ended: {stopped.sigval.name}") from None
        except ChildFailedError as error:
            rank, first = error.get_first_failure()
            raise RankError(_failure_message(Path(folder), count, rank, first)) from None
        silent = [rank for rank in range(count) if _marked(Path(folder), rank, "done") is None]
        if silent:
            raise RankError(f"rank {silent[0]} ended before its work was done")
        return results[0]


def run_entry(entry: Callable[..., T], *arguments: Any) -> T:
    """`entry` in the process of a rank. An exception is recorded for the launcher and ends the
    process; torch would also write it to a temporary file, which nothing removes."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        return entry(*arguments)
    except Exception as error:
        get_error_handler().record_exception(error)
        sys.exit(1)


def _marked(folder: Path, rank: int, kind: str) -> str | None:
    path = folder / f"rank.{rank}.{kind}"
    return path.read_text() if path.exists() else None


def _failure_message(folder: Path, count: int, rank: int, first: Any) -> str:
    """The error message: that of the first rank that failed for a reason of its own; else the ranks
    that ended by a signal or that others found gone or silent, and the messages of those that
    waited."""
    failed = {r: text for r in range(count) if (text := _marked(folder, r, "failed")) is not None}
    endings = {r: text for r in range(count) if (text := _marked(folder, r, "gone")) is not None}
    waiting = "; ".join(failed[r] for r in sorted(failed) if r not in endings)
    if rank not in failed and rank not in endings:
        end = f"exit code {first.exitcode}: {_last_line(first.message)}"
        if first.exitcode < 0:
            end = f"signal {signal.Signals(-first.exitcode).name}"
        endings = {rank: f"ended by {end}"}
    elif rank in endings and first.exitcode < 0 and endings[rank] == "ended":
        endings = {rank: f"ended by signal {signal.Signals(-first.exitcode).name}"}
    causes = [text for text in failed.values() if not text.endswith((ENDED, LATE))]
    if causes or not endings:
        return (causes or [failed[rank]])[0]
    ended = ", ".join(f"rank {r} {text} before its work was done" for r, text in endings.items())
    return f"{ended}; {waiting}" if waiting else ended


def _last_line(message: Any) -> str:
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    lines = [line for line in str(text).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
