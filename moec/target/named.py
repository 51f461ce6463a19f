"""Targets by their names, of every kind."""

from __future__ import annotations

from typing import TypeAlias

from moec.target import cpu, cuda

AnyTarget: TypeAlias = cpu.Target | cuda.CudaTarget


def parse(name: str) -> AnyTarget:
    """The target of that name: see `moec list targets`. Raises TargetError for any other name."""
    if name.partition(":")[0] == cuda.KIND:
        return cuda.parse(name)
    return cpu.parse(name)
