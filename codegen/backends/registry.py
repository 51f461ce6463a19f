"""The backend of a target, by its kind: moec's own first, then those that packages register.

A package registers a backend under the entry point group `moec.backends`; the name is the kind.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from moec.codegen.backend import Backend
from moec.codegen.backends.cpu.backend import CPU
from moec.codegen.backends.null import NULL
from moec.errors import TargetError
from moec.target import cuda
from moec.target.base import Target

BACKENDS = (CPU, NULL)


def backend_for(target: Target) -> Backend:
    """The backend for a target. Raises TargetError if there is none for its kind."""
    if target.kind == cuda.KIND:
        # Compiling for CPUs only must not import any GPU code.
        from moec.codegen.backends.cuda.backend import CUDA

        return CUDA
    for backend in BACKENDS:
        if backend.kind == target.kind:
            return backend
    for entry in entry_points(group="moec.backends", name=target.kind):
        backend = entry.load()
        if isinstance(backend, Backend):
            return backend
    kinds = ", ".join([*(backend.kind for backend in BACKENDS), cuda.KIND])
    raise TargetError(
        f"target {target.name!r}: there is no backend {target.kind!r}, only {kinds}; a package "
        "registers one under the entry points moec.backends"
    )
