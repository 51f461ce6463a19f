"""`moec compile --plan` and `moec run` for several ranks: what these commands do with a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.errors import UsageError, VerificationError

if TYPE_CHECKING:
    import torch

    from moec.ir.graph import Module, Program
    from moec.plan.plan import Plan


def compile_ranks(
    model: str,
    plan_file: Path,
    output: Path,
    arguments: Mapping[str, Any],
    verify: bool | float,
    force: bool,
) -> None:
    """Write the ranks' graphs and parts. Raises UsageError for a plan of another model, and
    VerificationError where the ranks together do not give the model's numbers."""
    from moec.api import compile as compile_model
    from moec.parallel.store import save_ranks
    from moec.passes.core.runner import Log
    from moec.passes.parallel.plan_parallelism import rank_programs
    from moec.plan.plan import read_plan

    plan = read_plan(plan_file)
    if arguments.get("quant"):
        raise UsageError("--plan and --quant exclude each other for now")
    compiled = compile_model(model, **arguments, verify=False, stop_after="split-packed")
    program, log = compiled.pass_results[-1].program, Log()
    module = rank_programs(program, plan, log)
    for declined in log.declined:
        click.echo(f"{declined.where}: not as planned: {declined.reason}", err=True)
    if verify is not False:
        check(module, program, plan, compiled.captured.example, verify)
    save_ranks(module, plan, output, replace=force)


def check(
    module: Module,
    program: Program,
    plan: Plan,
    example: tuple[torch.Tensor, ...],
    verify: bool | float,
) -> None:
    """Every rank, simulated in this process on the example, gives what the model gives."""
    from moec.interpret.evaluate import evaluate
    from moec.interpret.ranks import evaluate_ranks
    from moec.interpret.tolerance import default_tolerance, distance
    from moec.plan.groups import groups_of

    limit = default_tolerance(program.graph) if isinstance(verify, bool) else verify
    expected = evaluate(program.graph, example, program.weights)
    results = evaluate_ranks(module, [example] * plan.devices, groups_of(plan))
    for rank, outputs in enumerate(results):
        for value, result, right in zip(program.graph.results, outputs, expected, strict=True):
            if right.is_floating_point() and not distance(result, right) <= limit:
                raise VerificationError(
                    f"rank {rank} of the plan gives another {value.name}: it differs by "
                    f"{distance(result, right):.2e}, allowed are {limit:.2e}"
                )


def run_ranks(
    folder: Path,
    source: Path | None,
    output: Path | None,
    count: int | None,
    timeout: float,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run all ranks on this host, or under torchrun this one. Raises RankError."""
    from moec.parallel.launch import launch
    from moec.parallel.worker import Job, run_rank

    if source is None:
        raise UsageError(f"{folder} holds the ranks of a plan, which run on --input FILE")
    job = Job(folder, source, output, timeout, threads or 1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        shapes = run_rank(job)
        if os.environ["RANK"] != "0":
            return
    else:
        if count is None:
            raise UsageError(f"{folder} holds the ranks of a plan: say --nproc N, or use torchrun")
        shapes = launch(job, count)
    if as_json:
        click.echo(json.dumps({"artifact": str(folder), "outputs": shapes}, indent=1))
        return
    for name, shape in shapes.items():
        click.echo(f"{name}: {shape}")
