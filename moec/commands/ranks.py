"""`moec compile --plan` and `moec run` for several ranks: what these commands do with a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moec.commands.echo import echo
from moec.errors import NoMatch, UsageError, VerificationError
from moec.runtime.package import DECODE, MAIN

if TYPE_CHECKING:
    import torch

    from moec.commands.run_text import TextOptions
    from moec.ir.graph import Module, Program
    from moec.parallel.process import Job
    from moec.plan.plan import Plan


T = TypeVar("T")


def holds_ranks(path: Path) -> bool:
    """Whether `moec compile --plan` wrote this folder."""
    return os.path.isfile(path / "ranks.json")  # False for a name that is too long


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
    from moec.capture.doors import stop_tokens
    from moec.ir.graph import Module
    from moec.parallel.save import TextFiles, rank_function, save_ranks
    from moec.passes.core.runner import Log
    from moec.passes.decode import continues_text, incremental
    from moec.passes.parallel.plan_parallelism import rank_programs
    from moec.plan.plan import read_plan

    plan = read_plan(plan_file)
    if arguments.get("quant"):
        raise UsageError("--plan and --quant exclude each other for now")
    compiled = compile_model(model, **arguments, verify=False, stop_after="split-packed")
    program, log = compiled.pass_results[-1].program, Log()
    module = rank_programs(program, plan, log)
    for declined in log.declined:
        echo(f"{declined.where}: not as planned: {declined.reason}", err=True)
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
    """Every rank, simulated in this process on the example, gives what the model gives: where a
    capacity is counted over the tokens of all ranks, on the examples of all. `of_rank` is the
    example with the caches of a rank, which has some heads of the texts of several."""
    import torch

    from moec.interpret.evaluate import evaluate
    from moec.interpret.ranks import evaluate_ranks
    from moec.interpret.tolerance import default_tolerance, distance
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
                    f"rank {rank} of the plan gives another {value.name}: it differs by "
                    f"{distance(result, right):.2e}, allowed are {limit:.2e}"
                )


def first_step(
    step: Program, plan: Plan, example: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Inputs of `decode` for token ids [B, S] that nothing came before, with empty caches: of B
    texts, or of all ranks' that share the heads."""
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
    signed_by: Path | None,
) -> None:
    """Run all ranks on this host, or under torchrun this one. Raises RankError."""
    from moec.parallel.process import Job
    from moec.parallel.worker import run_rank

    if (source is None) == (not options.form):
        raise UsageError(f"{folder} holds the ranks of a plan: give --input FILE, or a prompt")
    job = Job(folder, source, output, timeout, threads or 1, signed_by=signed_by)
    if options.form:
        continue_prompts(job, options, count, as_json)
        return
    shapes = on_ranks(job, count, run_rank)
    if shapes is None:
        return
    if as_json:
        click.echo(json.dumps({"artifact": str(folder), "outputs": shapes}, indent=1))
        return
    for name, shape in shapes.items():
        echo(f"{name}: {shape}")


def continue_prompts(job: Job, options: TextOptions, count: int | None, as_json: bool) -> None:
    """The prompts with what continues them, when all texts have ended."""
    from moec.commands.run_text import read_prompts
    from moec.parallel.process import Continuation
    from moec.parallel.store import manifest_of, text_files
    from moec.parallel.worker import continue_rank
    from moec.runtime.generate import Request
    from moec.runtime.prompt import load_tokenizer
    from moec.runtime.sampling import Sampling
    from moec.runtime.write_text import new_texts

    if options.chat or options.stop:
        raise UsageError("the ranks of a plan take --prompt or --prompts, without --chat or --stop")
    prompts = read_prompts(options)
    tokenizer = load_tokenizer(text_files(job.folder, job.signed_by))
    manifest, _ = manifest_of(job.folder, job.signed_by)
    stop = frozenset(manifest.stop) or tokenizer.stop
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    request = Request(options.max_new_tokens, sampling, stop)
    ids = tuple(tuple(tokenizer.encode(prompt)) for prompt in prompts)
    tokens = on_ranks(replace(job, texts=Continuation(ids, request)), count, continue_rank)
    if tokens is None:
        return
    results = []
    for prompt, text, drawn in zip(prompts, new_texts(tokenizer, ids), tokens, strict=True):
        for token in drawn:
            text.add(token, stop)
        text.end()
        results.append({"prompt": prompt, "text": text.written, "tokens": drawn})
    if as_json:
        answer = {"texts": results} if options.prompts is not None else results[0]
        click.echo(json.dumps({"artifact": str(job.folder), **answer}, indent=1))
        return
    for result in results:
        told = {**result, "tokens": len(result["tokens"])}
        several = options.prompts is not None
        click.echo(json.dumps(told, ensure_ascii=False) if several else result["text"])


def on_ranks(job: Job, count: int | None, entry: Callable[[Job], T]) -> T | None:
    """What `entry` gives on rank 0; None on other ranks that torchrun started."""
    from moec.parallel.launch import launch

    if "TORCHELASTIC_RUN_ID" in os.environ:
        result = entry(job)
        return result if os.environ["RANK"] == "0" else None
    if count is None:
        raise UsageError(f"{job.folder} holds the ranks of a plan: say --nproc N, or use torchrun")
    return launch(job, count, entry)
