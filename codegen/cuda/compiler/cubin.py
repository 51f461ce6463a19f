"""Compiles CUDA C to cubins and PTX, by nvcc or NVRTC, and caches the results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moec.cache import OBJECTS, Store, default_store, key_of, load, save
from moec.codegen.cuda.compiler import nvcc, nvrtc
from moec.errors import TargetError
from moec.runtime.package import CUBIN, PTX
from moec.runtime.process.threads import available
from moec.target import nvidia
from moec.target.cuda import CudaTarget

_COMPILERS = {nvidia.NVCC: nvcc, nvidia.NVRTC: nvrtc}


@dataclass(frozen=True)
class Cubin:
    """Machine code, and the resources that ptxas reports: registers per thread, bytes of spilled
    registers, bytes of static shared memory. For several kernels, each is the maximum."""

    content: bytes
    registers: int
    spills: int
    static_shared: int


def compiler(target: CudaTarget) -> nvidia.Compiler:
    """nvcc if it is installed, otherwise NVRTC. Raises TargetError if neither is."""
    chosen = nvidia.nvcc() or nvidia.nvrtc()
    if chosen is None:
        raise TargetError(
            f"target {target.name!r}: there is neither nvcc nor NVRTC, and one of them must "
            "compile its kernels: pip install 'moec[cuda]', or install the CUDA toolkit and set "
            "CUDA_HOME or PATH to it"
        )
    return chosen


def machine_code(
    sources: Mapping[str, str], target: CudaTarget, store: Store | None = None
) -> dict[str, bytes]:
    """From the CUDA C of each part of a target: the cubin of each architecture, and the PTX of the
    last part, by their names in an artifact. `store` caches them; None means the user's store.

    Raises TargetError if there is no compiler, or if it fails.
    """
    chosen, store, last = compiler(target), store or default_store(), target.parts[-1].arch
    jobs = {f"{arch}{CUBIN}": (sources[arch], arch) for arch in target.archs}
    jobs[f"{last}{PTX}"] = sources[last], last.replace("sm_", nvidia.VIRTUAL)

    def compiled(job: tuple[str, str]) -> bytes:
        return _cubin(*job, chosen, store).content

    with ThreadPoolExecutor(available()) as pool:
        return dict(zip(jobs, pool.map(compiled, jobs.values()), strict=True))


def cubin(source: str, target: CudaTarget, store: Store | None = None) -> Cubin:
    """The cubin for the oldest architecture of a target; see `machine_code`."""
    return _cubin(source, target.arch, compiler(target), store or default_store())


def _cubin(source: str, arch: str, chosen: nvidia.Compiler, store: Store) -> Cubin:
    by = _COMPILERS[chosen.name]
    key = key_of("cubin", source, arch, chosen.name, chosen.version, *by.FLAGS)
    log_key = key_of("ptxas", key)
    content, log = load(store, OBJECTS, key), load(store, OBJECTS, log_key)
    if content is None or log is None:
        content, log = by.compiled(source, arch, chosen)
        save(store, OBJECTS, {key: content, log_key: log})
    text = log.decode(errors="replace")
    return Cubin(
        content,
        _most(r"Used (\d+) registers", text),
        _most(r"(\d+) bytes spill stores", text) + _most(r"(\d+) bytes spill loads", text),
        _most(r"(\d+) bytes smem", text),
    )


def _most(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)
