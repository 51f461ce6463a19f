"""manifest.json: the description of an artifact, which is read before any other part.

It lists every part with its size and SHA-256, and contains a SHA-256 of itself in canonical form.
The digests detect damage, not malice: an artifact is native code, and an untrusted one is as
dangerous as any untrusted program (`moec run --rebuild` ignores the code).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from moec.dtypes import INDEX_DTYPES
from moec.errors import ArtifactError
from moec.runtime.dtypes import NUMPY
from moec.runtime.package import (
    DECODE,
    MAIN,
    RECORDED,
    RECORDED_DECODE,
    ROUTE,
    Function,
    Package,
    Port,
    Size,
    StoredExperts,
    grows,
)
from moec.runtime.sizes import expressions as sizes

FORMAT = 6  # 6: the library's store of experts has neither guesses nor narrow copies
NAME = "manifest.json"
_LARGEST = 64 << 20  # bytes
_BEYOND = 1 << 48  # no axis, and no array in bytes, is so large
_AXES = 32


@dataclass(frozen=True)
class ManifestPart:
    size: int
    sha256: str


@dataclass(frozen=True)
class Stored:
    """An array as the raw little-endian bytes of one part."""

    part: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY[self.dtype].itemsize


@dataclass(frozen=True)
class StoredSample:
    """Inputs, and their outputs on the machine that compiled the model, by port name."""

    inputs: Mapping[str, Stored]
    outputs: Mapping[str, Stored]


@dataclass(frozen=True)
class Variant:
    """The same model for GPUs, if `Manifest.package` is for a CPU: without arrays and code.

    `arrays` are packed for its kernels; arrays that both pack alike are one part.
    """

    package: Package
    arrays: Mapping[str, Stored]


@dataclass(frozen=True)
class Manifest:
    """`package` is without its arrays and code; `arrays` maps the arrays to parts.

    `tolerance` is the greatest relative difference that `moec run --check` accepts; `extra` is data
    of the compiler: passes, blocks, the report.
    """

    package: Package
    parts: Mapping[str, ManifestPart]
    arrays: Mapping[str, Stored]
    machine: str  # as platform.machine() says: x86_64, aarch64
    samples: tuple[StoredSample, ...] = ()
    tolerance: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    for_gpu: Variant | None = None

    @property
    def target_name(self) -> str:
        """All that the model was compiled for."""
        names = [self.package.target_name]
        return ",".join([*names, self.for_gpu.package.target_name] if self.for_gpu else names)


def dump(manifest: Manifest) -> bytes:
    """The text of a manifest; `load(dump(m))` equals m."""
    body = msgspec.to_builtins(_without_parts(manifest), str_keys=True)
    for package in (body["package"], *([body["for_gpu"]["package"]] if body["for_gpu"] else [])):
        del package["arrays"], package["library"]
        if package["gpu"]:
            del package["gpu"]["parts"]
    text = {"moec": FORMAT, "sha256": digest_of(FORMAT, body), **body}
    return json.dumps(text, indent=1, ensure_ascii=False).encode() + b"\n"


def _without_parts(manifest: Manifest) -> Manifest:
    variant = manifest.for_gpu
    if variant is not None:
        variant = replace(variant, package=_bare(variant.package))
    return replace(manifest, package=_bare(manifest.package), for_gpu=variant)


def _bare(package: Package) -> Package:
    """The package without the data that other parts hold."""
    gpu = package.gpu and replace(package.gpu, parts={})
    return replace(package, arrays={}, library=b"", gpu=gpu)


def digest_of(version: int, body: Mapping[str, Any]) -> str:
    canonical = json.dumps([version, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def load(content: bytes | memoryview) -> Manifest:
    """The manifest that `dump` wrote.

    Raises ArtifactError where it is altered, of another format version, or malformed.
    """
    if len(content) > _LARGEST:
        raise ArtifactError(f"{NAME} has {len(content)} bytes, more than any manifest of moec")
    try:
        text = json.loads(bytes(content))
        json.dumps(text, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{NAME} is damaged: it is not JSON; copy the artifact again"
        ) from error
    if not isinstance(text, dict) or not isinstance(text.get("moec"), int):
        raise ArtifactError(f"{NAME} does not describe a moec artifact")
    if (version := text["moec"]) != FORMAT:
        older = "older" if version < FORMAT else "newer"
        raise ArtifactError(
            f"the artifact has format {version}, which is {older} than the format {FORMAT} of this "
            "moec: make it again by moec compile MODEL -o NAME, or install the moec that made it"
        )
    body = {key: value for key, value in text.items() if key not in ("moec", "sha256")}
    if text.get("sha256") != digest_of(version, body):
        raise ArtifactError(f"{NAME} was altered: its SHA-256 differs; copy the artifact again")
    try:
        manifest = msgspec.convert(body, Manifest, strict=True)
        manifest = _without_parts(manifest)
        _check(manifest)
    except (msgspec.ValidationError, KeyError, ValueError, ArtifactError) as error:
        raise ArtifactError(f"{NAME} is malformed: {type(error).__name__}: {error}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Raises ValueError where a (forged) manifest breaks a rule that the runtime relies on."""
    sampled = [a for s in manifest.samples for a in (*s.inputs.values(), *s.outputs.values())]
    variants = [Variant(manifest.package, manifest.arrays)]
    if manifest.for_gpu is not None:
        variants.append(manifest.for_gpu)
        if manifest.for_gpu.package.gpu is None or manifest.package.gpu is not None:
            raise ValueError(
                "a model for a CPU and for GPUs needs one part with and one part "
                "without GPU kernels"
            )
    for stored in (*(a for v in variants for a in v.arrays.values()), *sampled):
        fits = all(0 <= size < _BEYOND for size in stored.shape) and len(stored.shape) <= _AXES
        if stored.dtype not in NUMPY or not fits:
            raise ValueError(f"{stored.part} is {stored.dtype}{list(stored.shape)}")
        if stored.nbytes != manifest.parts[stored.part].size:
            raise ValueError(f"{stored.part} has another size than its shape needs")
    for variant in variants:
        _check_package(variant.package, variant.arrays)


def _check_package(package: Package, arrays: Mapping[str, Stored]) -> None:
    functions = list(package.functions.values())
    keys: set[str] = set()
    if package.store is not None:
        functions += package.store.functions.values()
        keys = {stack.key for layer in package.store.layers for stack in layer}
        _check_store(package.store, package, arrays)
    if MAIN not in package.functions:
        raise ValueError(f"there is no function {MAIN!r}")
    for port in (port for f in functions for port in (*f.ports, *f.params)):
        if port.dtype not in NUMPY:
            raise ValueError(f"{port.name} has the dtype {port.dtype!r}")
        for size in port.shape:
            if isinstance(size, int) and not 0 <= size < _BEYOND:
                raise ValueError(f"{port.name} has the size {size!r}")
            sizes.names(size)
    for function in functions:
        if not set(function.destinations) <= {p.name for p in function.outputs if p.dtype != "c64"}:
            raise ValueError("memory is passed for what is no output")
        for size in function.sizes:
            sizes.names(size)
        for limits in function.index_ranges.values():
            for size in limits:
                sizes.names(size)
        for port in function.params:
            if port.name not in keys:
                _check_bound(port.name, port, port.shape, arrays)
        for cache in function.caches:
            texts, *rest = cache.shape
            fixed = [n for axis, n in enumerate(rest) if not (grows(cache) and axis == 1)]
            if not isinstance(texts, str) or not all(isinstance(n, int) for n in fixed):
                raise ValueError(f"{cache.name} is not a cache with a free number of texts")
        for state in function.states:
            if not all(isinstance(size, int) for size in state.shape):
                raise ValueError(f"state {state.name} has no fixed size")
            if state.initial:
                _check_bound(state.initial, state, state.shape, arrays)
            if package.states[state.name] != state:
                raise ValueError(f"two functions disagree about the state {state.name}")
    if (package.generation is None) != (DECODE not in package.functions):
        raise ValueError(
            f"the function {DECODE!r} and its caches must both be present or both be absent"
        )
    outputs = [p.name for p in package.functions.get(ROUTE, Function()).outputs]
    for layer in package.routers:
        if not {layer.experts, layer.weights or layer.experts} <= set(outputs):
            raise ValueError(f"{ROUTE!r} does not return the choices of {layer.layer}")
    for name in package.sides:
        function, main = package.functions[name], package.main
        if function.states or function.caches or _types(function) != _types(main):
            raise ValueError(f"{name!r} takes or returns other tensors than {MAIN!r}")
    _check_recorded(package)


def _types(function: Function) -> list[tuple[str, str, int]]:
    ports = (*function.inputs, *function.outputs)
    return [(port.name, port.dtype, len(port.shape)) for port in ports]


def _check_store(store: StoredExperts, package: Package, arrays: Mapping[str, Stored]) -> None:
    """Each stack has arrays of as many experts as the others of its layer, and each function is one
    of the package with keys among its params."""
    for layer in store.layers:
        shapes = [arrays[name].shape for stack in layer for name in stack.arrays]
        if len({shape[:1] for shape in shapes}) != 1 or not all(map(math.prod, shapes)):
            raise ValueError("the stacks of a layer have different numbers of experts")
    keys = [Port(stack.key, "i64", (2,)) for layer in store.layers for stack in layer]
    for name, function in store.functions.items():
        others = tuple(port for port in function.params if port not in keys)
        if len(function.params) != len(others) + len(keys) or replace(
            function, params=()
        ) != replace(package.functions[name], params=()):
            raise ValueError(f"stored {name!r} is not {name!r} with experts in a store")


def _check_recorded(package: Package) -> None:
    """The recorded functions differ from the plain ones in outputs alone: the choices."""
    for name, recorded in ((MAIN, RECORDED), (DECODE, RECORDED_DECODE)):
        both = name in package.functions and bool(package.recorded)
        if (recorded in package.functions) != both:
            raise ValueError(f"the function {recorded!r} and the layers that it records differ")
        if not both:
            continue
        plain, function = package.functions[name], package.functions[recorded]
        choices = function.outputs[len(plain.outputs) :]
        alike = (function.inputs, function.states, function.caches) == (
            plain.inputs,
            plain.states,
            plain.caches,
        )
        same = alike and function.outputs[: len(plain.outputs)] == plain.outputs
        if not same or len(choices) != len(package.recorded):
            raise ValueError(f"{recorded!r} is not {name!r} with the choices of its layers")
        for port in choices:
            if port.dtype not in INDEX_DTYPES or len(port.shape) != 2:
                raise ValueError(f"{port.name} of {recorded!r} holds no choices [T, k]")


def _check_bound(
    name: str, port: Port, shape: tuple[Size, ...], arrays: Mapping[str, Stored]
) -> None:
    stored = arrays[name]
    pairs = port.dtype == "c64" and stored.dtype == "f32"  # complex numbers as (real, imaginary)
    if (stored.dtype, stored.shape) != (("f32", (*shape, 2)) if pairs else (port.dtype, shape)):
        raise ValueError(f"{name} does not fit the port {port.name}")
