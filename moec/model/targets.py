"""The targets of a compilation, and the backends that generate code for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.arguments import both_targets, target_of
from moec.codegen.backends import backend_for
from moec.target.cpu import CpuTarget

if TYPE_CHECKING:
    from moec.codegen.backend import Backend
    from moec.target.cuda import CudaTarget
    from moec.target.named import AnyTarget


@dataclass(frozen=True)
class Targets:
    """`target` with its backend; `beside` is a GPU for which code is generated too, or None."""

    target: AnyTarget
    backend: Backend
    beside: CudaTarget | None = None
    beside_backend: Backend | None = None

    @property
    def only_cpus(self) -> bool:
        return isinstance(self.target, CpuTarget) and self.beside is None


def choose_targets(target: Any, backend: Backend | None, *, builds: bool, runs: bool) -> Targets:
    """The targets by name, with `backend` in place of the one of its kind. `builds` is True where
    code is generated, `runs` where it runs here.

    Raises TargetError and UsageError where a name, a tool or an instruction is missing, now rather
    than after minutes.
    """
    target, beside = both_targets(target)
    of_beside = None
    if backend is not None and beside is not None and backend.kind == beside.kind:
        of_beside, backend = backend, None
    target = target_of(target, run=runs)
    backend = backend or backend_for(target)
    if beside is not None:
        of_beside = of_beside or backend_for(beside)
    if builds:
        backend.ready(target)
        if beside is not None and of_beside is not None:
            of_beside.ready(beside)
    return Targets(target, backend, beside, of_beside)
