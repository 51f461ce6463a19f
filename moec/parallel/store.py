"""The ranks of a plan in a folder: what all share once, and of each rank its graph and its part.

    ranks.json            sizes and SHA-256 of every other file
    plan.json
    shared.safetensors    weights that all ranks hold
    rank.N.moec           the graph of rank N, as text
    rank.N.decode.moec    its graph that continues text, where the model does
    rank.N.safetensors    the weights of rank N alone
    tokenizer/…           where the model came with one

A rank reads the shared part and its own, and checks them before anything else looks at them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors.torch import load, save

from moec.errors import ArtifactError, IRError, UsageError
from moec.files.os_errors import reason
from moec.interpret.verifier import verify
from moec.ir.graph import Module, Program, Stage
from moec.ir.text import parse, print_graph
from moec.plan.plan import Plan
from moec.runtime.package import DECODE, MAIN
from moec.runtime.prompt import FOLDER

MANIFEST = "ranks.json"
VERSION = 2


class FolderPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class FolderManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`stop` are the tokens that end a text; `no_generation` says why there is no graph that
    continues one."""

    version: int
    devices: Annotated[int, msgspec.Meta(ge=1)]
    parts: dict[str, FolderPart]
    stop: tuple[int, ...] = ()
    no_generation: str = ""


@dataclass(frozen=True)
class RankFiles:
    """What one rank runs; `digest` is that of the manifest, equal on ranks of one plan."""

    program: Program
    plan: Plan
    digest: bytes
    stop: tuple[int, ...] = ()


@dataclass(frozen=True)
class TextFiles:
    """What text needs: the tokenizer's files by name, the tokens that end a text, and why there
    is no generation where there is none."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    stop: tuple[int, ...] = ()
    no_generation: str = "it was compiled from a model that does not continue text"


def is_ranks(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def save_ranks(
    module: Module,
    plan: Plan,
    path: Path,
    *,
    text: TextFiles = TextFiles(),
    replace: bool = False,
) -> None:
    """Write `rank.N.main` of every rank, and `rank.N.decode` where the module has it. The folder
    appears whole or not at all.

    Raises UsageError where it exists and shall not be replaced.
    """
    if path.exists() and not replace:
        raise UsageError(f"{path} exists; --force replaces it")
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        files = {**_files(module, plan), **text.files}
        parts = {name: _written(folder / name, content) for name, content in files.items()}
        why = "" if rank_function(0, DECODE) in module else text.no_generation
        manifest = FolderManifest(VERSION, plan.devices, parts, text.stop, why)
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        if path.exists():
            shutil.rmtree(path)
        os.replace(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _files(module: Module, plan: Plan) -> Mapping[str, bytes]:
    weights = [_weights(module, rank) for rank in range(plan.devices)]
    shared = {
        name: tensor
        for name, tensor in weights[0].items()
        if all(tensors.get(name) is tensor for tensors in weights)
    }
    files = {
        "plan.json": msgspec.json.encode(plan),
        "shared.safetensors": save(_contiguous(shared)),
    }
    for rank, tensors in enumerate(weights):
        part = {name: tensor for name, tensor in tensors.items() if name not in shared}
        files[f"rank.{rank}.safetensors"] = save(_contiguous(part))
        for function in (MAIN, DECODE):
            if (name := rank_function(rank, function)) in module:
                files[_graph_file(rank, function)] = print_graph(module[name].graph).encode()
    return files


def rank_function(rank: int, function: str) -> str:
    """The name of a rank's function in a module."""
    return f"rank.{rank}.{function}"


def _graph_file(rank: int, function: str) -> str:
    return f"rank.{rank}.moec" if function == MAIN else f"rank.{rank}.{function}.moec"


def _weights(module: Module, rank: int) -> dict[str, torch.Tensor]:
    """Those of all functions of a rank, which share them by name. Raises IRError where two
    functions call different weights alike."""
    weights: dict[str, torch.Tensor] = {}
    for function in (MAIN, DECODE):
        if (name := rank_function(rank, function)) in module:
            for key, tensor in module[name].weights.items():
                if not torch.equal(weights.setdefault(key, tensor), tensor):
                    raise IRError(f"{name}: weight {key} is another than that of {MAIN}")
    return weights


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In memory of their own, as the file format has them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _written(path: Path, content: bytes) -> FolderPart:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return FolderPart(len(content), hashlib.sha256(content).hexdigest())


def manifest_of(path: Path) -> tuple[FolderManifest, bytes]:
    """The manifest and its digest. Raises ArtifactError."""
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = msgspec.json.decode(content, type=FolderManifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise ArtifactError(f"{path / MANIFEST}: {error}") from None
    if manifest.version != VERSION:
        raise ArtifactError(
            f"{path} was written by another moec (version {manifest.version} of its format, "
            f"expected {VERSION}); compile it again"
        )
    return manifest, hashlib.sha256(content).digest()


def text_files(path: Path) -> dict[str, bytes]:
    """The tokenizer's files. Raises ArtifactError where one is missing or altered."""
    manifest, _ = manifest_of(path)
    return {n: _checked(path, n, manifest) for n in manifest.parts if n.startswith(FOLDER)}


def load_rank(path: Path, rank: int, function: str = MAIN) -> RankFiles:
    """Raises ArtifactError where a file that this rank reads is missing or altered, or the model
    has no such function."""
    manifest, digest = manifest_of(path)
    if rank >= manifest.devices:
        raise ArtifactError(f"{path} is for {manifest.devices} ranks, there is no rank {rank}")
    if function == DECODE and manifest.no_generation:
        raise ArtifactError(f"{path} does not continue text: {manifest.no_generation}")
    try:
        plan = msgspec.json.decode(_checked(path, "plan.json", manifest), type=Plan)
        graph = parse(_checked(path, _graph_file(rank, function), manifest).decode())
        verify(graph, Stage.MOE)
    except (msgspec.MsgspecError, IRError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}, rank {rank}: {error}") from None
    weights = load(_checked(path, "shared.safetensors", manifest))
    weights |= load(_checked(path, f"rank.{rank}.safetensors", manifest))
    missing = [param.name for param in graph.params if param.name not in weights]
    if missing:
        raise ArtifactError(f"{path}, rank {rank}: no weight {', '.join(missing[:3])}")
    return RankFiles(Program(graph, weights), plan, digest, manifest.stop)


def _checked(path: Path, name: str, manifest: FolderManifest) -> bytes:
    part = manifest.parts.get(name)
    if part is None:
        raise ArtifactError(f"{path} lists no {name}")
    try:
        size = (path / name).stat().st_size
        content = (path / name).read_bytes() if size == part.size else b""
    except OSError as error:
        raise ArtifactError(f"{path / name}: {reason(error)}") from None
    if size != part.size or hashlib.sha256(content).hexdigest() != part.sha256:
        raise ArtifactError(f"{path / name} is altered; compile or copy the folder again")
    return content
