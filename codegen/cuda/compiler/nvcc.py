"""Compiles CUDA C to a cubin or PTX by nvcc, the compiler of the CUDA toolkit."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from moec.errors import TargetError
from moec.target.nvidia import VIRTUAL, Compiler

FLAGS = ("-O3", "--ptxas-options=-v")


def compiled(source: str, arch: str, nvcc: Compiler) -> tuple[bytes, bytes]:
    """The cubin, of a virtual architecture the PTX, and the output of ptxas. Raises TargetError if
    nvcc fails."""
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        binary = path.with_suffix(".cubin")
        form = "-ptx" if arch.startswith(VIRTUAL) else "-cubin"
        words = [nvcc.path, form, *FLAGS, f"-arch={arch}", str(path), "-o", str(binary)]
        result = subprocess.run(words, capture_output=True, check=False)
        if result.returncode or not binary.exists():
            reason = result.stderr.decode(errors="replace").replace(str(path), "kernel.cu").strip()
            raise TargetError(f"{nvcc.path} fails for {arch}: {reason}")
        return binary.read_bytes(), result.stderr
