"""Targets of every kind by their names."""

from __future__ import annotations

from typing import TypeAlias

from moec.errors import TargetNameError
from moec.target import cpu, cuda, nvidia

AnyTarget: TypeAlias = cpu.CpuTarget | cuda.CudaTarget


def parse_both(name: str) -> tuple[AnyTarget, cuda.CudaTarget | None]:
    """The first target, and the GPU target combined with it, or None: cpu,cuda:sm_80,sm_90a.

    Raises TargetError for an unknown name, and where the first is no CPU.
    """
    first, comma, rest = name.partition(f",{cuda.KIND}")
    if not comma:
        return parse(name), None
    beside = cuda.parse(cuda.KIND + rest)
    target = cpu.parse(first)
    if target.kind == cpu.NULL:
        raise TargetNameError(
            f"target {name!r}: {cpu.NULL!r} generates no code that could be combined with it"
        )
    return target, beside


def parse_for_ranks(name: str) -> AnyTarget:
    """The target of all ranks of a plan: "cpu", or GPUs. Raises TargetError for any other name."""
    target, beside = parse_both(name)
    if beside is not None or (target.kind != cuda.KIND and name != "cpu"):
        raise TargetNameError(
            f"target {name!r}: the ranks of a plan run all on CPUs of this machine's kind (cpu), "
            "or all on GPUs (cuda:sm_80,sm_90a): name one of these"
        )
    return target


def parse(name: str) -> AnyTarget:
    """The target of that name: see `moec list targets`. Raises TargetError for any other name."""
    if name.partition(":")[0] == cuda.KIND:
        return cuda.parse(name)
    return cpu.parse(name)


def missing_features(target: AnyTarget) -> tuple[str, ...]:
    """The features that code for the target needs and this machine lacks; empty if it runs."""
    if not isinstance(target, cuda.CudaTarget):
        return cpu.missing(target)
    driver = nvidia.driver()
    if driver is None:
        return ("an NVIDIA driver (libcuda.so.1)",)
    if not any(target.runs_on(gpu.capability) for gpu in driver.gpus):
        return (f"a GPU that runs code for {' or '.join(target.archs)}",)
    return ()
