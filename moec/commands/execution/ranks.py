"""`moec run` on several ranks."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moec.commands.output.echo import echo
from moec.errors import UsageError
from moec.runtime.package import DECODE

if TYPE_CHECKING:
    from moec.commands.execution.text import TextOptions
    from moec.parallel.process import Job


T = TypeVar("T")


def holds_ranks(path: Path) -> bool:
    """Whether the folder was written by `moec compile --plan`."""
    return os.path.isfile(path / "ranks.json")  # False for a name that is too long


def run_ranks(
    folder: Path,
    source: Path | None,
    output: Path | None,
    options: TextOptions,
    count: int | None,
    timeout: float,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    signed_by: Path | None,
) -> None:
    """Run all ranks on this host, or, under torchrun, this rank. Raises RankError."""
    from moec.commands.execution.text import read_prompts
    from moec.parallel.process import Job
    from moec.parallel.terminal import served
    from moec.parallel.worker import run_rank

    if (source is None) == (not options.form):
        raise UsageError(f"{folder} has the ranks of a plan: give --input FILE, or a prompt")
    job = Job(folder, source, output, timeout, threads or 1, signed_by=signed_by)
    if options.form:
        prompts = read_prompts(options) if os.environ.get("RANK", "0") == "0" else []
        with served() as terminal:
            near = "TORCHELASTIC_RUN_ID" in os.environ
            job = replace(job, terminal=None if near else terminal)
            answer = on_ranks(job, count, write_rank, options, prompts, as_json, quiet)
        if answer is not None and as_json:
            click.echo(json.dumps({"artifact": str(folder), **answer}, indent=1))
        return
    shapes = on_ranks(job, count, run_rank)
    if shapes is None:
        return
    if as_json:
        click.echo(json.dumps({"artifact": str(folder), "outputs": shapes}, indent=1))
        return
    for name, shape in shapes.items():
        echo(f"{name}: {shape}")


def write_rank(
    job: Job, options: TextOptions, prompts: Sequence[str | None], as_json: bool, quiet: bool
) -> dict[str, Any]:
    """Continue the prompts on this process's rank together with all others; returns the result for
    --json.

    Raises RankError, ArtifactError, and the errors of `write_texts`.
    """
    from moec.commands.execution.text import write_texts
    from moec.parallel.decoder import RankDecoder
    from moec.parallel.process import joined
    from moec.parallel.store import text_files
    from moec.parallel.terminal import agreed, terminal_of

    with joined(job, DECODE) as (ranks, files), terminal_of(job, ranks):
        # Every rank draws every token, so all use rank 0's seed if none was given.
        seed = secrets.randbits(32) if options.seed is None else options.seed
        prompts, seed = agreed(ranks, (prompts, seed))
        options = replace(options, seed=seed)
        texts, decoder = text_files(job.folder, job.signed_by), RankDecoder(files, ranks)
        return write_texts(texts, decoder, options, prompts, as_json=as_json, quiet=quiet)


def on_ranks(job: Job, count: int | None, entry: Callable[..., T], *arguments: Any) -> T | None:
    """The result of `entry` on rank 0; None on other ranks that torchrun started."""
    from moec.parallel.launch import launch

    if "TORCHELASTIC_RUN_ID" in os.environ:
        result = entry(job, *arguments)
        return result if os.environ["RANK"] == "0" else None
    if count is None:
        raise UsageError(f"{job.folder} has the ranks of a plan: give --nproc N, or use torchrun")
    return launch(job, count, entry, *arguments)
