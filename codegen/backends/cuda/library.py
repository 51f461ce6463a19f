"""Relax and CUDA kernels -> a host library, and the CUDA C of the kernels that it launches.

The host library is CPU machine code: it calls kernels, plans memory and computes sizes. It contains
no kernels; it finds them by name in the module that is imported into it when it is loaded.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import tvm

from moec.cache import Store, default_store
from moec.codegen.build import Objects, context, executable, lowered_calls, options_of
from moec.codegen.cpu.link import linked
from moec.codegen.cuda.compiler.source import Lowered, launcher, lowered
from moec.codegen.object_cache import compiled_objects, contents_of
from moec.target.cuda import HOST, CudaTarget


@dataclass(frozen=True)
class Launched:
    """`host` is a shared library; `kernels` are the kernels that it launches."""

    host: bytes
    kernels: Lowered


def launched(module: tvm.IRModule, target: CudaTarget, store: Store | None = None) -> Launched:
    """The code of a module from `lower`. Needs a C linker, but neither CUDA nor a GPU.

    Raises TargetError if there is no linker.
    """
    options = options_of(HOST, 2)
    with context(), options:
        functions, frame = executable(lowered_calls(module), options)
        # Functions that compute sizes run on the host; all others are kernels.
        sizes = {n: f for n, f in functions.items() if "tirx.is_host_func" in f.attrs}
        kernels = [f for n, f in functions.items() if n not in sizes]
        store = store or default_store()
        objects = compiled_objects(sizes, contents_of(sizes), options, store, checked=False)
    low = lowered(*kernels, target=target)
    parts = (*objects.values(), _object(launcher(low)))
    return Launched(linked(Objects(parts, frame, HOST), HOST), low)


def _object(module: tvm.runtime.Module) -> bytes:
    with tempfile.TemporaryDirectory(prefix="moec-") as folder:
        path = Path(folder) / "launch.o"
        module.write_to_file(str(path))
        return path.read_bytes()
