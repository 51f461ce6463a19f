"""The artifact: a compiled model on disk, and back.

    manifest.json    versions, target, ports, sizes, tolerance, and SHA-256 of every other part
    graphs/N.moec    the graph of each function that was compiled, as text: main, decode, ...
    kernels/lib.so   native code for a CPU; may be left out and rebuilt from the graph
    kernels/gpu/*    for each GPU architecture: its kernels (sm_80.cu), the library that launches
                     them (sm_80.so), and machine code (sm_80.cubin) or PTX (sm_90.ptx)
    weights/N.bin    one packed array each, little-endian, memory-mapped
    samples/N.bin    inputs and expected outputs for `moec run --check`
    tokenizer/*      the tokenizer's files, if the model has one
    passes.json      the graph of main after each pass, if they were kept, for `moec explore`
    store/digests.bin  SHA-256 of each expert, if experts can stay on disk: of each array in the
                     order of `StoredExperts`

`read` checks the format, the versions, the CPU, and the size and SHA-256 of every part except the
weights. Weights can be gigabytes, and SHA-256 takes about 1 s per GB and core, so they are hashed
on all cores, one digest per array, when the first of them is accessed; `runtime.call.executor.load`
starts that while TVM's runtime loads. No array is returned before all of them are verified, so
nothing runs on unverified bytes.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moec.errors import ArtifactError, TargetError
from moec.runtime.artifact import manifest as manifests
from moec.runtime.artifact.container import Container, open_container, replacing
from moec.runtime.artifact.manifest import Manifest, ManifestPart, Stored, StoredSample, Variant
from moec.runtime.artifact.mapped_arrays import MappedArrays, array_of, check_digests
from moec.runtime.artifact.part_writers import Buffer, on_all_cores
from moec.runtime.dtypes import Array, name_of
from moec.runtime.package import HOST_CODE, Package, StoredExperts
from moec.target import cpu
from moec.target.cpu import CpuNeeds

LOGGER = logging.getLogger(__name__)
LIBRARY = "kernels/lib.so"
GPU = "kernels/gpu/"
DIGESTS = "store/digests.bin"
PASSES = "passes.json"
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@dataclass(frozen=True)
class Sample:
    """Inputs, and their outputs on the machine that compiled the model, by port name."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class Artifact:
    """An artifact whose parts have been verified; its weights are verified on first use.

    `package.library` is empty if the native code was left out. `graphs` are the texts of its
    functions, by name. `files` are the parts that were added by name, such as
    `tokenizer/tokenizer.json`. `for_gpu` is the model for GPUs, if it was compiled for both and
    `package` is for a CPU. `expert_digests` are the SHA-256 of experts.
    """

    path: Path
    package: Package
    manifest: Manifest
    graphs: Mapping[str, str]
    samples: tuple[Sample, ...]
    files: Mapping[str, bytes]
    for_gpu: Package | None = None
    expert_digests: bytes = b""

    def __repr__(self) -> str:
        return f"<artifact {self.path}: {len(self.manifest.parts)} parts, {self.package!r}>"

    def verify(self) -> None:
        """Hash the weights now. Raises ArtifactError where one is altered."""
        for package in (self.package, self.for_gpu):
            if package is not None and isinstance(package.arrays, MappedArrays):
                package.arrays.verify()


def write(
    package: Package,
    path: Path | str,
    *,
    graphs: Mapping[str, str],
    samples: Sequence[Sample] = (),
    tolerance: float = 0.0,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, Buffer] | None = None,
    native: bool = True,
    folder: bool | None = None,
    overwrite: bool = True,
    for_gpu: Package | None = None,
) -> None:
    """Write `package` as one file, or as a folder (by default where `path` is a folder already).

    `graphs` are the texts of the functions' graphs by name, "main" at least. `files` are further
    parts by name (`tokenizer/tokenizer.json`); `extra` is stored in the manifest and must be plain
    JSON. `native=False` leaves the compiled code out; without `overwrite` an existing artifact is
    an error. `for_gpu` is the model for GPUs, in addition to a package for a CPU; weights that both
    read in the same layout are stored once. Raises UsageError where `path` is not an artifact, or
    not writable.
    """
    path = Path(path)
    parts: dict[str, Buffer] = {graph_part(name): text.encode() for name, text in graphs.items()}
    parts |= files or {}
    if native:
        parts |= {LIBRARY: package.library} if package.gpu is None else {}
        gpu = (for_gpu or package).gpu
        parts |= {GPU + n: part for n, part in gpu.parts.items()} if gpu else {}
    if package.store is not None:
        parts[DIGESTS] = _expert_digests(package, package.store)
    stored: dict[tuple[int, Stored], Stored] = {}

    def store(folder: str, array: Any) -> Stored:
        array = np.asarray(array)
        part = f"{folder}/{len(parts):05}.bin"
        parts[part] = _bytes(array)
        return Stored(part, name_of(array.dtype), array.shape)

    def store_weights(package: Package) -> dict[str, Stored]:
        initial = {state.initial for state in package.states.values() if state.initial}
        used = package.params.keys() | initial
        return {n: store_once(a) for n, a in package.arrays.items() if n in used}

    def store_once(array: Any) -> Stored:
        array = np.asarray(array)
        key = (array.ctypes.data, Stored("", name_of(array.dtype), array.shape))
        if not array.flags.c_contiguous or key not in stored:
            stored[key] = store("weights", array)
        return stored[key]

    stored_samples = tuple(
        StoredSample(
            {name: store("samples", a) for name, a in sample.inputs.items()},
            {name: store("samples", a) for name, a in sample.outputs.items()},
        )
        for sample in samples
    )
    arrays = store_weights(package)
    variant = None if for_gpu is None else Variant(for_gpu, store_weights(for_gpu))
    versions = {"moec": _version("moec"), "tvm": _version("apache-tvm"), **package.versions}
    manifest = Manifest(
        replace(package, versions=versions),
        {},
        arrays,
        package.target.mtriple.partition("-")[0] or platform.machine(),
        stored_samples,
        tolerance,
        dict(extra or {}),
        variant,
    )
    as_folder = path.is_dir() if folder is None else folder
    with replacing(path, folder=as_folder, overwrite=overwrite) as writer:
        listed = {
            name: ManifestPart(memoryview(parts[name]).nbytes, digest)
            for name, digest in writer.add(parts).items()
        }
        writer.add({manifests.NAME: manifests.dump(replace(manifest, parts=listed))})


def read(
    path: Path | str,
    *,
    native: bool = True,
    signed_by: Path | str | None = None,
    copy: bool = False,
) -> Artifact:
    """Open the artifact at `path` (a file or a folder). Nothing in it is loaded or run.

    `native=False` ignores its code, and so accepts code for another machine or TVM. `signed_by` is
    the file of a public key with which it must be signed. `copy` reads it into memory instead of
    mapping it: what becomes of the file later has no effect.

    Raises ArtifactError where it is missing, truncated, altered, of another version, for another
    CPU, with parts that its manifest does not list, not signed with that key, or larger than the
    memory for its copy, and UsageError where the key cannot be used.
    """
    path = Path(path)
    container = open_container(path, copy=copy)
    content = container.get(manifests.NAME)
    if content is None:
        raise ArtifactError(f"{path} is not a moec artifact (has no {manifests.NAME}): compile it")
    if signed_by is not None:
        from moec.runtime.artifact.signature import check_signature

        check_signature(path, content, Path(signed_by))
    try:
        manifest = manifests.load(content)
        if native:
            check_machine(manifest.machine)
            check_versions(manifest.package.versions)
        check_features(manifest.package.target)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error

    check_sizes(path, container, manifest)
    LOGGER.info("%s has %d parts and is for %s", path, len(container), manifest.target_name)
    variant = manifest.for_gpu
    stored = [*manifest.arrays.values(), *(variant.arrays.values() if variant else ())]
    weights = {array.part for array in stored}
    small = {name: container.held(name) for name in manifest.parts if name not in weights}
    check_digests(path, small, manifest.parts)

    graphs = _graphs(path, manifest, small)
    check_listed(path, container, {manifests.NAME, *manifest.parts})
    code = {n.removeprefix(GPU): bytes(small[n]) for n in small if n.startswith(GPU) and native}

    library = bytes(small.get(LIBRARY, b"")) if native else b""
    hosts = {GPU + name: host for name, host in code.items() if name.endswith(HOST_CODE)}
    for part, binary in {LIBRARY: library, **hosts}.items():
        _check_library(path, part, binary, manifest.machine)

    def with_parts(package: Package, library: bytes, arrays: Mapping[str, Stored]) -> Package:
        gpu = package.gpu and replace(package.gpu, parts=code)
        mapped = MappedArrays(path, container, manifest, arrays)
        return replace(package, arrays=mapped, library=library, gpu=gpu)

    sampled = tuple(
        Sample(
            {name: array_of(stored, small[stored.part]) for name, stored in s.inputs.items()},
            {name: array_of(stored, small[stored.part]) for name, stored in s.outputs.items()},
        )
        for s in manifest.samples
    )
    inner = ("samples/", "kernels/", "graphs/", DIGESTS, PASSES)
    named = {name for name in small if not name.startswith(inner)}
    return Artifact(
        path,
        with_parts(manifest.package, library, manifest.arrays),
        manifest,
        graphs,
        sampled,
        {name: bytes(small[name]) for name in sorted(named)},
        None if variant is None else with_parts(variant.package, b"", variant.arrays),
        bytes(small.get(DIGESTS, b"")),
    )


def check_sizes(path: Path, container: Container, manifest: Manifest) -> None:
    """Raises ArtifactError where a part that the manifest lists is missing, or its size is
    another."""
    for name, part in manifest.parts.items():
        file_part = container.file_parts.get(name)
        if file_part is None:
            raise ArtifactError(f"{path}: {name} is missing; compile or copy the artifact again")
        if file_part.size != part.size:
            raise ArtifactError(
                f"{path}: {name} has {file_part.size} bytes where the manifest says "
                f"{part.size}; compile or copy the artifact again"
            )


def check_listed(path: Path, names: Iterable[str], listed: Collection[str]) -> None:
    """Raises ArtifactError for a part that no manifest lists: it has no digest, and a signature
    does not cover it."""
    others = sorted(set(names) - set(listed))
    if others:
        more = f", and {len(others) - 1} others" if len(others) > 1 else ""
        raise ArtifactError(
            f"{path} holds {others[0]!r}{more}, which its manifest does not list: it was added "
            "after the artifact was written; remove it, or copy the artifact again"
        )


def graph_part(name: str) -> str:
    """The part that holds the graph of a function."""
    return f"graphs/{name}.moec"


def check_machine(machine: str) -> None:
    """Raise ArtifactError unless code made for `machine` runs here."""
    if machine != platform.machine():
        raise ArtifactError(
            f"it was compiled for {machine}, and this machine is {platform.machine()}; "
            "compile it for this machine, or run it with --rebuild"
        )


def check_features(needs: CpuNeeds) -> None:
    """Raise ArtifactError unless this CPU has the features that the kernels use."""
    target = cpu.CpuTarget(needs.name, needs.mcpu, needs.mattr, needs.mtriple, needs.features)
    try:
        cpu.require(target)
    except TargetError as error:
        raise ArtifactError(str(error)) from error


def check_versions(versions: Mapping[str, str]) -> None:
    """Raise ArtifactError unless the TVM here runs what the artifact's TVM compiled."""
    here, there = _version("apache-tvm"), versions.get("tvm", "none")
    if here.split(".")[:2] != there.split(".")[:2]:
        raise ArtifactError(
            f"it was compiled with TVM {there}, and TVM {here} is installed here; "
            f"install apache-tvm {there}, compile the model again, or run it with --rebuild"
        )


def _graphs(path: Path, manifest: Manifest, small: Mapping[str, Buffer]) -> dict[str, str]:
    """The text of the graph of each function. Raises ArtifactError where one is missing."""
    graphs = {}
    for name in manifest.package.functions:
        if (text := graph_part(name)) not in small:
            raise ArtifactError(f"{path} has no {text}; compile or copy the artifact again")
        graphs[name] = bytes(small[text]).decode(errors="replace")
    return graphs


def _check_library(path: Path, part: str, library: bytes, machine: str) -> None:
    """Raises ArtifactError for a file that is no library of this machine, on which the dynamic
    loader could crash."""
    if not library or not sys.platform.startswith("linux"):
        return
    elf_machine = _ELF_MACHINES.get(machine)
    if library[:5] != b"\x7fELF\2" or elf_machine not in (
        None,
        int.from_bytes(library[18:20], "little"),
    ):
        raise ArtifactError(f"{path}: {part} is not a library for {machine}")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def _expert_digests(package: Package, store: StoredExperts) -> bytes:
    names = [name for layer in store.layers for stack in layer for name in stack.arrays]

    def digests(name: str) -> bytes:
        return b"".join(
            hashlib.sha256(_bytes(e)).digest() for e in np.asarray(package.arrays[name])
        )

    return b"".join(on_all_cores(digests, names, [package.arrays[n].nbytes for n in names]))


def _bytes(array: Array) -> memoryview:
    contiguous = array if array.flags.c_contiguous else array.copy(order="C")
    return contiguous.reshape(-1).view(np.uint8).data
