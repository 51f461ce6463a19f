"""The fake driver (driver.c), and artifacts whose machine code it loads."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

from moec.runtime.package import Package
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
    """The package with emulated kernels in place of machine code (sm_90a.cubin): their path, then
    their names."""
    assert package.gpu is not None
    code, library = package.gpu, folder / f"{part}.so"
    source, launches = cuda_c(code, part.partition(".")[0])
    library.write_bytes(compiled_kernels(source, launches))
    names = " ".join(launch.name for launch in launches)
    parts = {**code.parts, part: f"{library}\0{names}".encode()}
    return replace(package, gpu=replace(code, parts=parts))
