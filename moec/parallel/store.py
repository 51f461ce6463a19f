"""The ranks of a plan in a folder: what all share once, and of each rank its graph and its part.

    ranks.json            sizes and SHA-256 of every other file
    plan.json
    shared.safetensors    weights that all ranks hold
    rank.N.moec           the graph of rank N, as text
    rank.N.safetensors    the weights of rank N alone

A rank reads the shared part and its own, and checks them before anything else looks at them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors.torch import load, save

from moec.errors import ArtifactError, IRError, UsageError
from moec.interpret.verifier import verify
from moec.ir.graph import Module, Program, Stage
from moec.ir.text import parse, print_graph
from moec.plan.plan import Plan

MANIFEST = "ranks.json"
VERSION = 1


class FolderPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class FolderManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    devices: Annotated[int, msgspec.Meta(ge=1)]
    parts: dict[str, FolderPart]


@dataclass(frozen=True)
class RankFiles:
    """What one rank runs; `digest` is that of the manifest, equal on ranks of one plan."""

    program: Program
    plan: Plan
    digest: bytes


def is_ranks(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def save_ranks(module: Module, plan: Plan, path: Path, *, replace: bool = False) -> None:
    """Write `rank.N.main` of every rank. The folder appears whole or not at all.

    Raises UsageError where it exists and shall not be replaced.
    """
    if path.exists() and not replace:
        raise UsageError(f"{path} exists; --force replaces it")
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        parts = {
            name: _written(folder / name, content) for name, content in _files(module, plan).items()
        }
        manifest = FolderManifest(VERSION, plan.devices, parts)
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        if path.exists():
            shutil.rmtree(path)
        os.replace(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _files(module: Module, plan: Plan) -> Mapping[str, bytes]:
    programs = [module[f"rank.{rank}.main"] for rank in range(plan.devices)]
    first = programs[0].weights
    shared = {
        name: tensor
        for name, tensor in first.items()
        if all(program.weights.get(name) is tensor for program in programs)
    }
    files = {
        "plan.json": msgspec.json.encode(plan),
        "shared.safetensors": save(_contiguous(shared)),
    }
    for rank, program in enumerate(programs):
        part = {name: t for name, t in program.weights.items() if name not in shared}
        files[f"rank.{rank}.moec"] = print_graph(program.graph).encode()
        files[f"rank.{rank}.safetensors"] = save(_contiguous(part))
    return files


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In memory of their own, as the file format has them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _written(path: Path, content: bytes) -> FolderPart:
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


def load_rank(path: Path, rank: int) -> RankFiles:
    """Raises ArtifactError where a file that this rank reads is missing or altered."""
    manifest, digest = manifest_of(path)
    if rank >= manifest.devices:
        raise ArtifactError(f"{path} is for {manifest.devices} ranks, there is no rank {rank}")
    try:
        plan = msgspec.json.decode(_checked(path, "plan.json", manifest), type=Plan)
        graph = parse(_checked(path, f"rank.{rank}.moec", manifest).decode())
        verify(graph, Stage.MOE)
    except (msgspec.MsgspecError, IRError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}, rank {rank}: {error}") from None
    weights = load(_checked(path, "shared.safetensors", manifest))
    weights |= load(_checked(path, f"rank.{rank}.safetensors", manifest))
    missing = [param.name for param in graph.params if param.name not in weights]
    if missing:
        raise ArtifactError(f"{path}, rank {rank}: no weight {', '.join(missing[:3])}")
    return RankFiles(Program(graph, weights), plan, digest)


def _checked(path: Path, name: str, manifest: FolderManifest) -> bytes:
    part = manifest.parts.get(name)
    if part is None:
        raise ArtifactError(f"{path} lists no {name}")
    try:
        size = (path / name).stat().st_size
        content = (path / name).read_bytes() if size == part.size else b""
    except OSError as error:
        raise ArtifactError(f"{path / name}: {error.strerror}") from None
    if size != part.size or hashlib.sha256(content).hexdigest() != part.sha256:
        raise ArtifactError(f"{path / name} is altered; compile or copy the folder again")
    return content
