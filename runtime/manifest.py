"""manifest.json: what an artifact says about itself, before any other part is looked at.

It lists every part with its size and SHA-256, and carries its own SHA-256, taken over the
rest of it in canonical form. The digests find damage, not malice: an artifact is native code,
and a stranger's is no safer than a stranger's program (`moec run --rebuild` leaves the code out).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moec.errors import ArtifactError
from moec.runtime import sizes
from moec.runtime.dtypes import NUMPY
from moec.runtime.package import (
    Chosen,
    CpuNeeds,
    Package,
    Port,
    Routers,
    Size,
    StatePort,
    Step,
    grows,
)

FORMAT = 2
NAME = "manifest.json"
_LARGEST = 64 << 20  # bytes


@dataclass(frozen=True)
class Part:
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
class Sample:
    """Inputs and the outputs that the compiler's machine gave for them, by the name of the port."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """`package` is without its arrays and library, and `samples` hold `Stored` in their stead.

    `tolerance` is the greatest relative difference that `moec run --check` accepts; `extra`
    is what the compiler wants to remember: passes, blocks, the report.
    """

    package: Package
    parts: Mapping[str, Part]
    arrays: Mapping[str, Stored]
    machine: str  # as platform.machine() says: x86_64, aarch64
    samples: tuple[Sample, ...] = ()
    tolerance: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


def dump(manifest: Manifest) -> bytes:
    """The text of a manifest; `load(dump(m))` equals m."""
    package = {
        name: value
        for name, value in vars(manifest.package).items()
        if name not in ("arrays", "library")
    }
    body = {
        "package": {name: _plain(value) for name, value in package.items()},
        "machine": manifest.machine,
        "tolerance": manifest.tolerance,
        "arrays": {name: asdict(stored) for name, stored in manifest.arrays.items()},
        "samples": [
            {
                side: {name: asdict(stored) for name, stored in getattr(sample, side).items()}
                for side in ("inputs", "outputs")
            }
            for sample in manifest.samples
        ],
        "extra": manifest.extra,
        "parts": {name: asdict(part) for name, part in manifest.parts.items()},
    }
    body = json.loads(json.dumps(body))  # tuples become lists, before the digest is taken
    text = {"moec": FORMAT, "sha256": _digest(FORMAT, body), **body}
    return json.dumps(text, indent=1, ensure_ascii=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return dict(value) if isinstance(value, Mapping) else value


def _digest(version: int, body: Mapping[str, Any]) -> str:
    canonical = json.dumps([version, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def load(content: bytes | memoryview) -> Manifest:
    """The manifest that `dump` wrote.

    Raises ArtifactError where it is altered, of another format version, or malformed.
    """
    if len(content) > _LARGEST:
        raise ArtifactError(f"{NAME} has {len(content)} bytes; no manifest of moec is so large")
    try:
        text = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{NAME} is damaged: it is not JSON; copy the artifact again"
        ) from error
    if not isinstance(text, dict) or not isinstance(text.get("moec"), int):
        raise ArtifactError(f"{NAME} does not describe a moec artifact")
    if (version := text["moec"]) != FORMAT:
        older = "older" if version < FORMAT else "newer"
        raise ArtifactError(
            f"the artifact has format {version}, which is {older} than the format {FORMAT} that "
            "this moec reads; compile the model again, or install the moec that made it"
        )
    body = {key: value for key, value in text.items() if key not in ("moec", "sha256")}
    if text.get("sha256") != _digest(version, body):
        raise ArtifactError(f"{NAME} was altered: its SHA-256 differs; copy the artifact again")
    try:
        manifest = _manifest(body)
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{NAME} is malformed: {type(error).__name__}: {error}") from error
    return manifest


def _manifest(body: Mapping[str, Any]) -> Manifest:
    raw = body["package"]
    target = dict(raw["target"])
    target |= {name: tuple(target[name]) for name in ("mattr", "features")}
    package = Package(
        target=CpuNeeds(**target),
        inputs=_ports(raw["inputs"]),
        outputs=_ports(raw["outputs"]),
        states=tuple(StatePort(**_port(p), initial=p["initial"]) for p in raw["states"]),
        sizes={name: (int(low), high) for name, (low, high) in raw["sizes"].items()},
        params=_ports(raw["params"]),
        arrays={},
        library=b"",
        index_ranges={name: (int(a), int(b)) for name, (a, b) in raw["index_ranges"].items()},
        kernels=tuple((str(a), str(b)) for a, b in raw["kernels"]),
        notes=tuple(map(str, raw["notes"])),
        versions={str(name): str(version) for name, version in raw["versions"].items()},
        step=None if raw["step"] is None else _step(raw["step"]),
        no_step=str(raw["no_step"]),
        routers=_routers(raw["routers"]) if raw.get("routers") else None,
        tunings=_tunings(raw.get("tunings", {})),
    )
    return Manifest(
        package,
        {name: Part(int(p["size"]), str(p["sha256"])) for name, p in body["parts"].items()},
        _stored(body["arrays"]),
        str(body["machine"]),
        tuple(Sample(_stored(s["inputs"]), _stored(s["outputs"])) for s in body["samples"]),
        float(body["tolerance"]),
        dict(body["extra"]),
    )


def _step(raw: Mapping[str, Any]) -> Step:
    longest = raw["longest"]
    return Step(
        _ports(raw["caches"]),
        Port(**_port(raw["logits"])),
        _ports(raw["params"]),
        int(raw["vocabulary"]),
        None if longest is None else int(longest),
        tuple(map(int, raw["stop"])),
    )


def _routers(raw: Mapping[str, Any]) -> Routers:
    return Routers(
        _ports(raw["inputs"]),
        _ports(raw["outputs"]),
        tuple(Chosen(*(str(r[n]) for n in ("layer", "experts", "weights"))) for r in raw["layers"]),
        _ports(raw["route"]),
        _ports(raw["routed"]),
    )


def _tunings(raw: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    return {
        str(kernel): {str(name): int(value) for name, value in values.items()}
        for kernel, values in raw.items()
    }


def _stored(arrays: Mapping[str, Any]) -> dict[str, Stored]:
    return {
        name: Stored(str(a["part"]), str(a["dtype"]), tuple(map(int, a["shape"])))
        for name, a in arrays.items()
    }


def _port(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": str(raw["name"]), "dtype": str(raw["dtype"]), "shape": tuple(raw["shape"])}


def _ports(raw: list[Any]) -> tuple[Port, ...]:
    return tuple(Port(**_port(p)) for p in raw)


def _check(manifest: Manifest) -> None:
    """The rules that the rest of the runtime relies on, kept even by a forged manifest."""
    package, step = manifest.package, manifest.package.step
    held = (*step.caches, step.logits) if step else ()
    routers = package.routers
    chosen = (*routers.inputs, *routers.outputs) if routers else ()
    ports = (*package.inputs, *package.outputs, *package.states, *held, *chosen)
    for port in (*ports, *package.every_param):
        if port.dtype not in NUMPY:
            raise ValueError(f"{port.name} has the dtype {port.dtype!r}")
        for size in port.shape:
            if not isinstance(size, str) and (type(size) is not int or size < 0):
                raise ValueError(f"{port.name} has the size {size!r}")
            sizes.names(size)
    for name, (_, high) in package.sizes.items():
        if high is not None and type(high) is not int:
            raise ValueError(f"size {name} has the bound {high!r}")
    sampled = [a for s in manifest.samples for a in (*s.inputs.values(), *s.outputs.values())]
    for stored in (*manifest.arrays.values(), *sampled):
        if stored.dtype not in NUMPY or min(stored.shape, default=0) < 0:
            raise ValueError(f"{stored.part} is {stored.dtype}{list(stored.shape)}")
        if stored.nbytes != manifest.parts[stored.part].size:
            raise ValueError(f"{stored.part} is not of the size that its shape needs")
    for port in package.every_param:
        _check_bound(port.name, port, port.shape, manifest.arrays)
    for cache in step.caches if step else ():
        texts, *rest = cache.shape
        fixed = [size for place, size in enumerate(rest) if not (grows(cache) and place == 1)]
        if not isinstance(texts, str) or not all(isinstance(size, int) for size in fixed):
            raise ValueError(f"{cache.name} is no cache for any number of texts")
    for state in package.states:
        if not all(isinstance(size, int) for size in state.shape):
            raise ValueError(f"state {state.name} has no fixed size")
        if state.initial:
            _check_bound(state.initial, state, state.shape, manifest.arrays)


def _check_bound(
    name: str, port: Port, shape: tuple[Size, ...], arrays: Mapping[str, Stored]
) -> None:
    stored = arrays[name]
    pairs = port.dtype == "c64" and stored.dtype == "f32"  # complex numbers as (real, imaginary)
    if (stored.dtype, stored.shape) != (("f32", (*shape, 2)) if pairs else (port.dtype, shape)):
        raise ValueError(f"{name} does not fit the port {port.name}")
