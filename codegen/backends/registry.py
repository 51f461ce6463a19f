"""The backend of a target, by its kind: moec's own first, then those that packages register.

A package registers a backend under the entry point group `moec.backends`; the name is the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from tvm import IRModule

from moec.cache import Store
from moec.codegen.backend import Backend
from moec.codegen.backends.cpu.backend import CPU
from moec.errors import TargetError
from moec.runtime.package import BuiltLibrary
from moec.target import cuda
from moec.target.base import Target


# A backend that compiles nothing: the rules and the packed weights of CPUs, but no code.
#
# It shows within a second what is recognised, which kernel each op gets, and how large an artifact
# would be. A model made with it cannot be run; `moec run --rebuild` compiles its graph.
def _library(
    modules: Mapping[str, IRModule], target: Any, opt_level: int, store: Store | None
) -> BuiltLibrary:
    return BuiltLibrary()


NULL = Backend("null", CPU.rules, CPU.kernels, CPU.loop, _library)


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
