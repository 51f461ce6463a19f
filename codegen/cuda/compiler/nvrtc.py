"""Compiles CUDA C to a cubin or PTX by NVRTC, a library in NVIDIA's wheels that needs no toolkit
and no GPU.

See "General Usage" in the NVRTC documentation. An option makes functions without a qualifier device
code, as nvcc does for the functions that TVM emits before the first kernel.
"""

from __future__ import annotations

import ctypes
from functools import cache

from moec.errors import TargetError
from moec.target.nvidia import VIRTUAL, Compiler

FLAGS = ("-default-device", "--disable-warnings", "--ptxas-options=-v")


def compiled(source: str, arch: str, nvrtc: Compiler) -> tuple[bytes, bytes]:
    """The cubin, of a virtual architecture the PTX, and the output of ptxas. Raises TargetError if
    NVRTC fails."""
    library, program = _library(nvrtc.path), ctypes.c_void_p()
    includes = (f"-I{folder}" for folder in nvrtc.includes)
    words = [word.encode() for word in (f"--gpu-architecture={arch}", *FLAGS, *includes)]
    text = source.encode()
    library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None)
    try:
        options = (ctypes.c_char_p * len(words))(*words)
        failed = library.nvrtcCompileProgram(program, len(words), options)
        log = _content(library, program, "ProgramLog").rstrip(b"\0")
        if failed:
            reason = log.decode(errors="replace").strip() or f"error {failed}"
            raise TargetError(f"{nvrtc.path} fails for {arch}: {reason}")
        form = "PTX" if arch.startswith(VIRTUAL) else "CUBIN"
        return _content(library, program, form), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _library(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def _content(library: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> bytes:
    size = ctypes.c_size_t()
    library[f"nvrtcGet{name}Size"](program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    library[f"nvrtcGet{name}"](program, buffer)
    return buffer.raw
