"""NVIDIA's software on this machine: the driver with its GPUs, nvcc, NVRTC.

It is not imported for CPU targets, and does not need torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LIBRARY = "libcuda.so.1"
NVCC, NVRTC = "nvcc", "NVRTC"
VIRTUAL = "compute_"
"""How the name of an architecture begins whose code is PTX, which drivers compile."""
NO_DRIVER = f"there is no NVIDIA driver here ({LIBRARY})"
_NAME = 256  # bytes for the name of a GPU
# CUDA Driver API, CUdevice_attribute.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """`memory` in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def digits(self) -> str:
        return ".".join(map(str, self.capability))


@dataclass(frozen=True)
class Driver:
    """`version` is the newest CUDA that it runs, such as 13.0."""

    version: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Compiler:
    """A compiler of CUDA C, with the version of its toolkit: nvcc, a program, or NVRTC, a library,
    with the folders of CUDA's headers."""

    path: str
    version: str
    name: str = NVCC
    includes: tuple[str, ...] = ()


def capability_of(arch: str) -> tuple[int, int]:
    """sm_90a -> (9, 0)"""
    digits = arch.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs machine code for `arch`: it has the same major
    version and is not older, or, if `arch` ends in "a", is exactly this chip."""
    major, minor = capability_of(arch)
    if arch.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


@cache
def driver() -> Driver | None:
    """This machine's driver; None where there is none, or it does not start."""
    library = _library()
    if library is None:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    library.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_gpu(library, index) for index in range(count.value))
    return Driver(f"{version.value // 1000}.{version.value % 1000 // 10}", gpus)


def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    return None if library.cuInit(0) else library


def free_memory(index: int) -> int:
    """The free bytes of a GPU; 0 if unknown. Starts its context, which takes some hundred MB, as
    any program on it does."""
    library = _library()
    if library is None:
        return 0
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library.cuDeviceGet(ctypes.byref(device), index)
    if library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return 0
    try:
        library.cuCtxPushCurrent_v2(context)
        library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        library.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        library.cuDevicePrimaryCtxRelease_v2(device)
    return free.value


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(_NAME), ctypes.c_size_t()
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, _NAME, device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(code: int) -> int:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), code, device)
        return value.value

    text = name.value.decode(errors="replace")
    return Gpu(text, (attribute(_MAJOR), attribute(_MINOR)), memory.value)


def nvcc() -> Compiler | None:
    """The nvcc of $CUDA_HOME or $PATH; None if none runs."""
    return _nvcc(_search_path(os.environ))


def _search_path(env: Mapping[str, str]) -> str:
    home = env.get("CUDA_HOME", "")
    return os.pathsep.join(filter(None, [home and str(Path(home, "bin")), env.get("PATH", "")]))


@cache
def _nvcc(search: str) -> Compiler | None:
    path = shutil.which("nvcc", path=search)
    if path is None:
        return None
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"V(\d+(?:\.\d+)+)", answer.stdout)
    return Compiler(path, version[1]) if version and not answer.returncode else None


def nvrtc() -> Compiler | None:
    """NVRTC with CUDA's headers, from NVIDIA's wheels (`moec[cuda]`) or a toolkit; None if either
    is missing."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return _nvrtc((*wheels(), home))


def wheels() -> tuple[str, ...]:
    """The folders of NVIDIA's wheels, each with `lib` and `include`."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or ()
    return tuple(str(path) for root in folders for path in sorted(Path(root).glob("cu[0-9]*")))


_HEADERS = ("cuda_bf16.h", "cuda/std/cstdint", "crt/host_defines.h")
"""One of each wheel that has headers."""


@cache
def _nvrtc(roots: tuple[str, ...]) -> Compiler | None:
    """NVRTC and headers among `roots`, which are several if wheels are installed separately."""
    folders = [Path(root, "include", part) for root in roots for part in ("", "cccl")]
    includes = tuple(str(folder) for folder in folders if folder.is_dir())
    if not all(any(Path(folder, name).exists() for folder in includes) for name in _HEADERS):
        return None
    paths = (path for root in roots for path in sorted(Path(root).glob("lib*/libnvrtc.so.*")))
    for path in paths:
        major, minor = ctypes.c_int(), ctypes.c_int()
        try:
            ctypes.CDLL(str(path)).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        except (OSError, AttributeError):
            continue
        return Compiler(str(path), f"{major.value}.{minor.value}", NVRTC, includes)
    return None
