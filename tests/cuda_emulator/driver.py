"""The fake driver (driver.c), and packages whose machine code it loads."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tvm import IRModule

from moec.cache import Store
from moec.codegen.backend import Backend
from moec.codegen.backends.cuda.backend import CUDA_TEXT
from moec.runtime.package import BuiltLibrary, GpuCode, Package
from moec.target.cuda import CudaTarget
from tests.cuda_emulator.emulate import compiled_kernels
from tests.cuda_emulator.models import cuda_c

_VERSIONS = "libcudart.so.13 { global: cuda*; local: *; };"


def write_driver(folder: Path) -> dict[str, str]:
    """libcuda and libcudart into a folder; the environment of processes that find them."""
    (versions := folder / "versions").write_text(_VERSIONS)
    source = Path(__file__).with_name("driver.c")
    driver, runtime = folder / "libcuda.so.1", folder / "libcudart.so.13"
    words = ["gcc", "-shared", "-fPIC", "-w", str(source), "-ldl"]
    subprocess.run([*words, f"-Wl,-soname,{driver.name}", "-o", str(driver)], check=True)
    words += ["-DRUNTIME", f"-Wl,-soname,{runtime.name}", f"-Wl,--version-script={versions}"]
    subprocess.run([*words, str(driver), "-o", str(runtime)], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "CUDA_HOME": str(folder)}


def for_stand_in(package: Package, folder: Path, part: str) -> Package:
    """The package with emulated kernels in place of machine code (sm_90a.cubin)."""
    assert package.gpu is not None
    return replace(package, gpu=_emulated(package.gpu, folder, part))


def stand_in(folder: Path, part: str) -> Backend:
    """The backend for GPUs, with emulated kernels in place of machine code."""

    def library(
        modules: Mapping[str, IRModule], target: CudaTarget, opt_level: int, store: Store | None
    ) -> BuiltLibrary:
        text = CUDA_TEXT.library(modules, target, opt_level, store)
        assert text.gpu is not None
        return replace(text, gpu=_emulated(text.gpu, folder, part))

    return replace(CUDA_TEXT, library=library)


def _emulated(code: GpuCode, folder: Path, part: str) -> GpuCode:
    """In place of machine code the path of the emulated kernels, then their names."""
    source, launches = cuda_c(code, part.partition(".")[0])
    content = compiled_kernels(source, launches)
    library = folder / f"{part}.{hashlib.sha256(content).hexdigest()[:16]}.so"
    library.write_bytes(content)
    names = " ".join(launch.name for launch in launches)
    return replace(code, parts={**code.parts, part: f"{library}\0{names}".encode()})
