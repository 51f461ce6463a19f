"""`moec.compile_ranks`: compiles a model for the ranks of a plan, and verifies the result."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from moec.api import compile
from moec.arguments import check_tf32, tolerance
from moec.capture.language_models import stop_tokens
from moec.codegen.backends import backend_for
from moec.errors import NoMatch, SetupError, UsageError
from moec.ir.graph import Module
from moec.ir.text import print_graph
from moec.options import compile_options
from moec.parallel.compile import compile_function
from moec.parallel.segments import RankCode
from moec.parallel.store import (
    MANIFEST,
    VERSION,
    CodeSignature,
    FolderManifest,
    FolderPart,
    code_file,
    gpu_file,
    graph_file,
    library_file,
)
from moec.passes.core.runner import Declined, Log
from moec.passes.decode import continues_text, incremental
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.plan.plan import Plan, read_plan
from moec.runtime.artifact import manifest as manifests
from moec.runtime.artifact.manifest import Manifest, ManifestPart, Stored
from moec.runtime.dtypes import Array, name_of
from moec.runtime.package import DECODE, MAIN
from moec.runtime.process.byte_sizes import MOST_MEMORY
from moec.target import cpu
from moec.target.named import AnyTarget, parse_for_ranks
from moec.verify.ranks import Ranked, check_ranks
from moec.verify.references import intended


@dataclass(frozen=True)
class TextFiles:
    """The files and data for text: the tokenizer's files by name, the tokens that end a text, and
    the reason if text cannot be generated."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    stop: tuple[int, ...] = ()
    no_generation: str = "it was compiled from a model that cannot continue text"


def save_ranks(
    module: Module,
    plan: Plan,
    path: Path,
    *,
    text: TextFiles = TextFiles(),
    replace: bool = False,
    target: AnyTarget | None = None,
) -> None:
    """Compile `rank.N.main` of every rank, and `rank.N.decode` if the module has it, for `target`
    (by default this machine's processor), and write them. A failure leaves no partial folder.

    Raises UsageError where the folder exists and must not be replaced, and as `compile_function`.
    """
    check_replaceable(path, replace)
    target = target or cpu.host()
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        files = {"plan.json": msgspec.json.encode(plan), **text.files}
        for function in (MAIN, DECODE):
            names = [rank_function(rank, function) for rank in range(plan.devices)]
            programs = (module[name] for name in names if name in module)
            codes = compile_function(programs, function, target)
            for rank, code in enumerate(codes):
                files[code_file(rank, function)] = _written_code(folder, rank, function, code)
        parts = {name: _written(folder, name, content) for name, content in files.items()}
        why = "" if rank_function(0, DECODE) in module else text.no_generation
        manifest = FolderManifest(VERSION, plan.devices, parts, text.stop, why, target.name)
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        if path.exists():
            shutil.rmtree(path)
        os.replace(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_replaceable(path: Path, replace: bool) -> None:
    """Raises UsageError where something is at `path` that must not be replaced."""
    if path.exists() and not replace:
        raise SetupError(f"{path} exists; --force (overwrite=True in Python) replaces it")
    if path.exists() and not (path / MANIFEST).is_file():
        raise SetupError(
            f"{path} is not a folder of ranks, and only such folders are replaced: choose another "
            "name"
        )


def rank_function(rank: int, function: str) -> str:
    """The name of a rank's function in a module."""
    return f"rank.{rank}.{function}"


def _written_code(folder: Path, rank: int, function: str, code: RankCode) -> bytes:
    """Write the parts of a rank's function; returns its manifest."""
    files = {
        graph_file(rank, function): print_graph(code.graph).encode(),
        library_file(rank, function): code.package.library,
    }
    if code.package.gpu is not None:
        files |= {gpu_file(rank, function, n): c for n, c in code.package.gpu.parts.items()}
    parts: dict[str, ManifestPart] = {}
    for name, content in files.items():
        part = _written(folder, name, content)
        parts[name] = ManifestPart(part.size, part.sha256)
    arrays: dict[str, Stored] = {}
    for name, array in code.package.arrays.items():
        arrays[name], parts[arrays[name].part] = _written_array(folder, np.asarray(array))
    return manifests.dump(
        Manifest(
            code.package,
            parts,
            arrays,
            code.package.target.mtriple.partition("-")[0] or platform.machine(),
            extra=msgspec.to_builtins(CodeSignature(code.signature, code.generation)),
        )
    )


def _written_array(folder: Path, array: Array) -> tuple[Stored, ManifestPart]:
    """Write an array. Equal arrays of several ranks are one file, named by its content."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    part = ManifestPart(content.nbytes, hashlib.sha256(content).hexdigest())
    name = f"weights/{part.sha256}.bin"
    if not (folder / name).exists():
        _written(folder, name, content)
    return Stored(name, name_of(array.dtype), array.shape), part


def _written(folder: Path, name: str, content: bytes | memoryview) -> FolderPart:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return FolderPart(memoryview(content).nbytes, hashlib.sha256(content).hexdigest())


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
