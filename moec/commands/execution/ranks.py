"""`moec compile --plan`, and `moec run` on several ranks."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moec.commands.output.echo import echo
from moec.errors import NoMatch, UsageError, VerificationError
from moec.runtime.package import DECODE, MAIN

if TYPE_CHECKING:
    import torch

    from moec.commands.execution.text import TextOptions
    from moec.ir.graph import Module, Program
    from moec.parallel.process import Job
    from moec.plan.plan import Plan


T = TypeVar("T")


def holds_ranks(path: Path) -> bool:
    """Whether the folder was written by `moec compile --plan`."""
    return os.path.isfile(path / "ranks.json")  # False for a name that is too long


def compile_ranks(
    model: str,
    plan_file: Path,
    output: Path,
    arguments: Mapping[str, Any],
    verify: bool | float,
    force: bool,
) -> None:
    """Write the graphs and weights of the ranks. Raises UsageError for a plan of another model, and
    VerificationError where the ranks together do not compute the model's results."""
    from moec import compile as compile_model
    from moec.capture.doors import stop_tokens
    from moec.ir.graph import Module
    from moec.parallel.save import TextFiles, rank_function, save_ranks
    from moec.passes.core.runner import Log
    from moec.passes.decode import continues_text, incremental
    from moec.passes.parallel.plan_parallelism import rank_programs
    from moec.plan.plan import read_plan

    plan = read_plan(plan_file)
    if arguments.get("quant"):
        raise UsageError("--plan and --quant cannot be combined yet: leave one out")
    compiled = compile_model(model, **arguments, verify=False, stop_after="split-packed")
    program, log = compiled.pass_results[-1].program, Log()
    module = rank_programs(program, plan, log)
    for declined in log.declined:
        echo(f"{declined.where}: not run as planned: {declined.reason}", err=True)
    example = compiled.captured.example
    if verify is not False:
        check(module, program, plan, example, verify)
    text = TextFiles()
    if continues_text(program.graph):
        try:
            step = incremental(program)
        except NoMatch as why:
            text = replace(text, no_generation=str(why))
            echo(f"text generation: {why}", err=True)
        else:
            module = Module(
                {**module.programs, **rank_programs(step, plan, function=DECODE).programs}
            )
            if verify is not False:
                inputs = first_step(step, plan, example)
                of_rank = first_step(module[rank_function(0, DECODE)], plan, example)
                check(module, step, plan, inputs, verify, DECODE, of_rank)
            source = compiled.source
            files = {name: file.read_bytes() for name, file in source.files.items()}
            text = TextFiles(files, stop_tokens(source.model))
    save_ranks(module, plan, output, text=text, replace=force)


def check(
    module: Module,
    program: Program,
    plan: Plan,
    example: tuple[torch.Tensor, ...],
    verify: bool | float,
    function: str = MAIN,
    of_rank: tuple[torch.Tensor, ...] | None = None,
) -> None:
    """Simulate all ranks in this process on the example, and compare with the model. Raises
    VerificationError where they differ.

    A capacity that counts the tokens of all ranks is checked on the examples of all ranks.
    `of_rank` is the example with the caches of one rank, which has some heads of the texts of
    several ranks.
    """
    import torch

    from moec.interpret.evaluate import evaluate
    from moec.interpret.ranks import evaluate_ranks
    from moec.oracle.tolerance import default_tolerance, distance
    from moec.plan.groups import groups_of

    limit = default_tolerance(program.graph) if isinstance(verify, bool) else verify
    joint = any(op.name == "moe.capacity" for op in program.graph.ops)
    inputs = [torch.cat([t] * plan.devices) for t in example] if joint else example
    expected = evaluate(program.graph, inputs, program.weights)
    feeds = [of_rank or example] * plan.devices
    results = evaluate_ranks(module, feeds, groups_of(plan), function)
    for rank, outputs in enumerate(results):
        parts = [t.chunk(plan.devices)[rank] if joint else t for t in expected]
        for value, result, right in zip(program.graph.results, outputs, parts, strict=True):
            if value not in program.graph.outputs and len(result) != len(right):
                degree = len(result) // len(right)
                right = torch.cat([right] * degree).chunk(degree, 1)[rank % degree]
            if right.is_floating_point() and not distance(result, right) <= limit:
                raise VerificationError(
                    f"rank {rank} computes another {value.name}: it differs by "
                    f"{distance(result, right):.2e}, allowed up to {limit:.2e}"
                )


def first_step(
    step: Program, plan: Plan, example: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Inputs of `decode` for token ids [B, S] without previous tokens, with empty caches: of B
    texts, or of the texts of all ranks that share the heads."""
    import torch

    from moec.ir.aten import TORCH_DTYPES
    from moec.plan.groups import tp_texts

    (ids,) = example
    texts, tokens = ids.shape
    shared = {tp_texts(layer.attention): layer.attention * texts for layer in plan.layers}
    caches = [
        torch.zeros(
            [
                shared.get(str(value.shape[0]), texts),
                *(size if isinstance(size, int) else tokens for size in value.shape[1:]),
            ],
            dtype=TORCH_DTYPES[value.dtype],
        )
        for value in (state.before for state in step.graph.states)
    ]
    last = torch.full((texts,), tokens - 1)
    return ids, torch.zeros_like(last), torch.arange(texts) * tokens + last, last, *caches


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
    job: Job, options: TextOptions, prompts: Sequence[str], as_json: bool, quiet: bool
) -> dict[str, Any]:
    """Continue the prompts, or chat, on this process's rank together with all others; returns the
    result for --json.

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
