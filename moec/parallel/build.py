"""`moec.compile_ranks`: compiles a model for the ranks of a plan, and verifies the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moec.api import compile
from moec.arguments import check_tf32, tolerance
from moec.capture.language_models import stop_tokens
from moec.codegen.backends import backend_for
from moec.errors import NoMatch, UsageError
from moec.ir.graph import Module
from moec.options import compile_options
from moec.parallel.save import TextFiles, check_replaceable, save_ranks
from moec.passes.core.runner import Declined, Log
from moec.passes.decode import continues_text, incremental
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.plan.plan import Plan, read_plan
from moec.runtime.package import DECODE
from moec.runtime.process.byte_sizes import MOST_MEMORY
from moec.target.named import parse_for_ranks
from moec.verify.ranks import Ranked, check_ranks
from moec.verify.references import intended


@dataclass(frozen=True)
class CompiledRanks:
    """A folder that was written, and what does not run as planned: a layer, or text generation."""

    folder: Path
    declined: tuple[Declined, ...]


def compile_ranks(
    model: Any,
    plan: Plan | Path | str,
    output: Path | str,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool | float | str = True,
    overwrite: bool = False,
    target: str = "cpu",
    **options: Any,
) -> CompiledRanks:
    """Compile the graphs of all ranks of a plan into a folder for `moec run --nproc` or
    `moec.parallel.model.open_rank`.

    `model`, `args` and `kwargs` are those of `moec.compile`, and so are the `options` (docs/api.md
    lists which). `plan` is a plan or a file that `moec plan` wrote. `verify` simulates all ranks in
    this process and compares their results with eager's before anything is written; a float is the
    greatest error allowed, relative to the greatest value of an output. `overwrite` replaces a
    folder at `output`. `target` is "cpu" (this machine's kind of processor), or GPUs such as
    "cuda:sm_80,sm_90a", whose code is not run here.

    Raises UsageError for a plan of another model, UnsupportedError for what ranks cannot compute,
    TargetError for another target and where a compiler is missing, VerificationError where the
    ranks together do not compute the model's results, and what `moec.compile` raises.
    """
    accepted = {name for name, option in compile_options().items() if option.ranks}
    if others := options.keys() - accepted:
        name = min(others)
        raise UsageError(
            f"{name} cannot be combined with a plan: leave it out (compile_ranks takes "
            f"{', '.join(sorted(accepted))})"
        )
    limit, folder, on = tolerance(verify), Path(output), parse_for_ranks(target)
    check_replaceable(folder, overwrite)
    backend_for(on).ready(on)
    plan = plan if isinstance(plan, Plan) else read_plan(Path(plan))
    compiled = compile(
        model, args, kwargs, verify=False, stop_after="split-packed", memory=MOST_MEMORY, **options
    )
    program, log = compiled.pass_results[-1].program, Log()
    check_tf32(on, program.weights)
    module = rank_programs(program, plan, log)
    captured = intended(compiled.captured, compiled.pass_results)
    if verify is not False:
        check_ranks(captured, Ranked(program, module, plan), limit)
    text = TextFiles()
    if continues_text(program.graph):
        try:
            step = incremental(program)
        except NoMatch as why:
            text = replace(text, no_generation=str(why))
            log.decline("text generation", str(why))
        else:
            steps = rank_programs(step, plan, function=DECODE)
            if verify is not False:
                check_ranks(captured, Ranked(step, steps, plan, DECODE), limit)
            module = Module({**module.programs, **steps.programs})
            files = compiled.source.files
            text = TextFiles(files, stop_tokens(compiled.source.model))
    save_ranks(module, plan, folder, text=text, replace=overwrite, target=on)
    return CompiledRanks(folder, tuple(log.declined))
