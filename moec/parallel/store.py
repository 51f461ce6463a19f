"""The folder of a plan's ranks, in which data of several ranks is stored once.

    ranks.json            sizes and SHA-256 of the plan, the tokenizer and the ranks' manifests
    plan.json
    rank.N/main.json      a manifest as an artifact's: sizes and SHA-256 of the files of rank N
    rank.N/main.moec      its graph as text
    rank.N/main.so        its compiled segments
    rank.N/main.gpu/*     the GPU kernels that they launch: kernels.cu, sm_80.cubin
    rank.N/decode.*       the same for continuing text, if the model does
    weights/SHA256.bin    one array each, packed for the kernels, memory-mapped
    tokenizer/…           if the model has one

A rank reads the files in its own manifest, and checks each before using it. Ranks of one host share
the memory of equal arrays.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec

from moec.errors import ArtifactError, IRError
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular
from moec.ir.graph import Stage
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse
from moec.parallel.segments import RankCode
from moec.plan.plan import Plan
from moec.runtime.artifact import artifact
from moec.runtime.artifact import manifest as manifests
from moec.runtime.artifact.container import open_container
from moec.runtime.artifact.mapped_arrays import MappedArrays, check_digests
from moec.runtime.artifact.signature import check_signature
from moec.runtime.package import DECODE, MAIN, Function, Generation
from moec.runtime.text.prompt import FOLDER

MANIFEST = "ranks.json"
VERSION = 4  # 4: the target


class FolderPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class FolderManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`target` is the name of the target of all ranks; `stop` are the tokens that end a text;
    `no_generation` is the reason if there is no graph that continues text."""

    version: int
    devices: Annotated[int, msgspec.Meta(ge=1)]
    parts: dict[str, FolderPart]
    stop: tuple[int, ...] = ()
    no_generation: str = ""
    target: str = ""


class CodeSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The signature of a rank's complete function; its package has those of the segments."""

    signature: Function
    generation: Generation | None


@dataclass(frozen=True)
class RankFiles:
    """What one rank runs; `digest`, of the folder's manifest, is equal on all ranks of a plan."""

    code: RankCode
    plan: Plan
    digest: bytes
    stop: tuple[int, ...] = ()


def code_file(rank: int, function: str) -> str:
    """The manifest of a rank's function."""
    return f"rank.{rank}/{function}.json"


def graph_file(rank: int, function: str) -> str:
    return f"rank.{rank}/{function}.moec"


def library_file(rank: int, function: str) -> str:
    return f"rank.{rank}/{function}.so"


def gpu_file(rank: int, function: str, name: str = "") -> str:
    return f"rank.{rank}/{function}.gpu/{name}"


def manifest_of(path: Path, signed_by: Path | None = None) -> tuple[FolderManifest, bytes]:
    """The manifest and its digest. `signed_by` is the file of the public key by which it must be
    signed. Raises ArtifactError."""
    content = _manifest_content(path, signed_by)
    return _decoded(path, content), hashlib.sha256(content).digest()


def _manifest_content(path: Path, signed_by: Path | None) -> bytes:
    try:
        content = read_regular(path / MANIFEST)
    except OSError as error:
        raise ArtifactError(f"{path / MANIFEST}: {reason(error)}") from None
    if signed_by is not None:
        check_signature(path, content, signed_by)
    return content


def _decoded(path: Path, content: bytes) -> FolderManifest:
    try:
        manifest = msgspec.json.decode(content, type=FolderManifest)
    except msgspec.MsgspecError as error:
        raise ArtifactError(f"{path / MANIFEST}: {error}") from None
    if manifest.version != VERSION:
        raise ArtifactError(
            f"{path} was written by another version of moec (version {manifest.version} of its "
            f"format, expected {VERSION}); compile it again"
        )
    return manifest


def verify_folder(path: Path, signed_by: Path | None = None) -> tuple[FolderManifest, bytes]:
    """The manifest and its bytes, after all other files were compared with it and with the
    manifests of the ranks. Raises ArtifactError."""
    content = _manifest_content(path, signed_by)
    manifest = _decoded(path, content)
    container = open_container(path)
    listed = {MANIFEST, *manifest.parts}
    for name in manifest.parts:
        part = _checked(path, name, manifest)
        if name.startswith("rank."):
            of_rank = manifests.load(part)
            artifact.check_sizes(path, container, of_rank)
            check_digests(path, {n: container[n] for n in of_rank.parts}, of_rank.parts)
            listed |= of_rank.parts.keys()
    artifact.check_listed(path, container, listed)
    return manifest, content


def text_files(path: Path, signed_by: Path | None = None) -> dict[str, bytes]:
    """The tokenizer's files. Raises ArtifactError where one is missing or altered."""
    manifest, _ = manifest_of(path, signed_by)
    return {n: _checked(path, n, manifest) for n in manifest.parts if n.startswith(FOLDER)}


@dataclass(frozen=True)
class RankSize:
    """The functions of a rank, and the bytes of the weights that it reads."""

    rank: int
    functions: tuple[str, ...]
    weights: int


def read_plan(path: Path) -> tuple[Plan, list[RankSize]]:
    """The plan of a folder, and the sizes of its ranks. Raises ArtifactError where a file that says
    so is missing or altered."""
    manifest, _ = manifest_of(path)
    try:
        plan = msgspec.json.decode(_checked(path, "plan.json", manifest), type=Plan)
    except msgspec.MsgspecError as error:
        raise ArtifactError(f"{path}/plan.json: {error}") from None
    ranks = []
    for rank in range(manifest.devices):
        functions = tuple(f for f in (MAIN, DECODE) if code_file(rank, f) in manifest.parts)
        files = (manifests.load(_checked(path, code_file(rank, f), manifest)) for f in functions)
        parts = {
            array.part: of_rank.parts[array.part].size
            for of_rank in files
            for array in of_rank.arrays.values()
        }
        ranks.append(RankSize(rank, functions, sum(parts.values())))
    return plan, ranks


def load_rank(
    path: Path, rank: int, function: str = MAIN, signed_by: Path | None = None
) -> RankFiles:
    """The files of one rank. Raises ArtifactError where one is missing or altered, where it is for
    another processor, where the model has no such function, or where the folder is not signed by
    the key in the file `signed_by`."""
    manifest, digest = manifest_of(path, signed_by)
    if rank >= manifest.devices:
        raise ArtifactError(f"{path} is for {manifest.devices} ranks, there is no rank {rank}")
    if function == DECODE and manifest.no_generation:
        raise ArtifactError(f"{path} does not continue text: {manifest.no_generation}")
    try:
        plan = msgspec.json.decode(_checked(path, "plan.json", manifest), type=Plan)
        code = _code(path, rank, function, _checked(path, code_file(rank, function), manifest))
    except (msgspec.MsgspecError, IRError, UnicodeDecodeError, KeyError) as error:
        raise ArtifactError(f"{path}, rank {rank}: {error}") from None
    if code.package.target_name != manifest.target:
        raise ArtifactError(
            f"{path} is for {manifest.target}, and rank {rank} for {code.package.target_name}: "
            "compile the plan again"
        )
    return RankFiles(code, plan, digest, manifest.stop)


def _code(path: Path, rank: int, function: str, content: bytes) -> RankCode:
    try:
        manifest = manifests.load(content)
        artifact.check_machine(manifest.machine)
        artifact.check_versions(manifest.package.versions)
        artifact.check_features(manifest.package.target)
    except ArtifactError as error:
        raise ArtifactError(f"{path}, rank {rank}: {error}") from error
    container = open_container(path)
    artifact.check_sizes(path, container, manifest)
    weights = {array.part for array in manifest.arrays.values()}
    small = {name: container[name] for name in manifest.parts if name not in weights}
    check_digests(path, small, manifest.parts)
    record = msgspec.convert(manifest.extra, CodeSignature)
    graph = parse(bytes(small[graph_file(rank, function)]).decode())
    verify(graph, Stage.GROUPED)
    gpu, of_gpu = manifest.package.gpu, gpu_file(rank, function)
    kernels = {n.removeprefix(of_gpu): bytes(small[n]) for n in small if n.startswith(of_gpu)}
    package = replace(
        manifest.package,
        gpu=gpu and replace(gpu, parts=kernels),
        library=bytes(small[library_file(rank, function)]),
        arrays=MappedArrays(path, container, manifest, manifest.arrays),
    )
    return RankCode(graph, record.signature, package, record.generation)


def _checked(path: Path, name: str, manifest: FolderManifest) -> bytes:
    part = manifest.parts.get(name)
    if part is None:
        raise ArtifactError(f"{path} lists no {name}")
    try:
        size = (path / name).stat().st_size
        content = read_regular(path / name, size) if size == part.size else b""
    except OSError as error:
        raise ArtifactError(f"{path / name}: {reason(error)}") from None
    if size != part.size or hashlib.sha256(content).hexdigest() != part.sha256:
        raise ArtifactError(
            f"{path / name} was changed after it was written; compile or copy the folder again"
        )
    return content
