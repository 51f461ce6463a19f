"""Writes the ranks of a plan into a folder, see `moec.parallel.store`."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from moec.errors import UsageError
from moec.ir.graph import Module
from moec.ir.text import print_graph
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
from moec.plan.plan import Plan
from moec.runtime.artifact import manifest as manifests
from moec.runtime.artifact.manifest import Manifest, ManifestPart, Stored
from moec.runtime.dtypes import Array, name_of
from moec.runtime.package import DECODE, MAIN
from moec.target import cpu
from moec.target.named import AnyTarget


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
        raise UsageError(f"{path} exists; --force (overwrite=True in Python) replaces it")
    if path.exists() and not (path / MANIFEST).is_file():
        raise UsageError(
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
