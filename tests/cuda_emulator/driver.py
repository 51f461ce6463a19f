"""The fake driver (driver.c), and artifacts whose machine code it loads."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

from moec.codegen.cuda.compiler.source import PART
from moec.runtime.package import Package
from tests.cuda_emulator.emulate import compiled_kernels

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


def for_stand_in(package: Package, folder: Path, arch: str) -> Package:
    """The package with emulated kernels in place of machine code: their path, then their names."""
    assert package.gpu is not None
    code = package.gpu
    library = folder / f"{arch}.so"
    library.write_bytes(compiled_kernels(code.parts[PART].decode(), code.launches))
    names = " ".join(launch.name for launch in code.launches)
    parts = {**code.parts, f"{arch}.cubin": f"{library}\0{names}".encode()}
    return replace(package, gpu=replace(code, parts=parts))
