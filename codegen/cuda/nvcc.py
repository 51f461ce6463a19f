"""CUDA C -> cubins, by nvcc, once: later ones come from the cache."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moec.cache import OBJECTS, Store, default_store, key_of, load, save
from moec.errors import TargetError
from moec.target import nvidia
from moec.target.cuda import CudaTarget

_FLAGS = ("-cubin", "-O3", "--ptxas-options=-v")


@dataclass(frozen=True)
class Cubin:
    """Machine code, and what ptxas says of it, of the first of its kernels: registers of a thread,
    bytes that spill from them, bytes of static shared memory."""

    content: bytes
    registers: int
    spills: int
    static_shared: int


def compiler(target: CudaTarget) -> nvidia.Compiler:
    """Raises TargetError where there is none."""
    nvcc = nvidia.nvcc()
    if nvcc is None:
        raise TargetError(
            f"target {target.name!r}: there is no nvcc, which compiles its kernels; install the "
            "CUDA toolkit, and set CUDA_HOME or PATH to it"
        )
    return nvcc


def cubins(source: str, target: CudaTarget, store: Store | None = None) -> dict[str, Cubin]:
    """Kernels for each architecture of a target. `store` has those of before; None stands for
    the user's.

    Raises TargetError where there is no nvcc, or it fails.
    """
    nvcc = compiler(target)
    return {arch: _cubin(source, arch, nvcc, store or default_store()) for arch in target.archs}


def cubin(source: str, target: CudaTarget, store: Store | None = None) -> Cubin:
    """As `cubins`, for the oldest architecture of a target."""
    return _cubin(source, target.arch, compiler(target), store or default_store())


def _cubin(source: str, arch: str, nvcc: nvidia.Compiler, store: Store) -> Cubin:
    key = key_of("cubin", source, arch, nvcc.version, *_FLAGS)
    log_key = key_of("ptxas", key)
    content, log = load(store, OBJECTS, key), load(store, OBJECTS, log_key)
    if content is None or log is None:
        content, log = _compile(source, arch, nvcc)
        save(store, OBJECTS, {key: content, log_key: log})
    text = log.decode(errors="replace")
    return Cubin(
        content,
        _number(r"Used (\d+) registers", text),
        _number(r"(\d+) bytes spill stores", text) + _number(r"(\d+) bytes spill loads", text),
        _number(r"(\d+) bytes smem", text),
    )


def _compile(source: str, arch: str, nvcc: nvidia.Compiler) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        binary = path.with_suffix(".cubin")
        words = [nvcc.path, *_FLAGS, f"-arch={arch}", str(path), "-o", str(binary)]
        result = subprocess.run(words, capture_output=True, check=False)
        if result.returncode or not binary.exists():
            reason = result.stderr.decode(errors="replace").replace(str(path), "kernel.cu").strip()
            raise TargetError(f"{nvcc.path} fails for {arch}: {reason}")
        return binary.read_bytes(), result.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
