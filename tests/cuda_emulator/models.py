"""Whole models on the CPU: emulated CUDA kernels under their real host code."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moec.runtime.call.executor import Executor
from moec.runtime.device.device import Cpu
from moec.runtime.device.library import open_library
from moec.runtime.package import HOST_CODE, MAIN, SOURCE, GpuCode, Launch, Package
from tests.cuda_emulator.emulate import SCHEDULES, EmulationError, Schedule, imported


@dataclass(frozen=True)
class EmulatedModel:
    """A package for GPUs that takes tensors of the CPU."""

    executor: Executor
    library: ctypes.CDLL

    def __call__(
        self, inputs: Mapping[str, Any], function: str = MAIN, schedule: Schedule = SCHEDULES[0]
    ) -> dict[str, Any]:
        """Raises EmulationError where a kernel does what a GPU would not let pass."""
        self.library.emulator_schedule(schedule.late, schedule.skewed)
        results = self.executor(inputs, function)
        if message := self.library.emulator_message().decode():
            raise EmulationError(message)
        return results


def cuda_c(code: GpuCode | None, arch: str = "") -> tuple[str, tuple[Launch, ...]]:
    """The CUDA C for an architecture, by default the oldest, and its launches."""
    assert code is not None
    arch = arch or next(iter(code.launches))
    return code.parts[arch + SOURCE].decode(), code.launches[arch]


def emulated_model(
    package: Package, change: Callable[[str], str] = str, arch: str = ""
) -> EmulatedModel:
    """The code for an architecture, by default the oldest. `change` edits the CUDA C of the
    kernels: a bug, planted."""
    functions, library = _functions(package, change, arch)
    return EmulatedModel(Executor(package, functions), library)


def _functions(
    package: Package, change: Callable[[str], str] = str, arch: str = ""
) -> tuple[Mapping[str, Any], ctypes.CDLL]:
    source, launches = cuda_c(package.gpu, arch)
    assert package.gpu is not None
    host = package.gpu.parts[(arch or next(iter(package.gpu.launches))) + HOST_CODE]
    libraries: list[ctypes.CDLL] = []

    def kernels(host: Any) -> None:
        libraries.append(imported(host, change(source), launches))

    functions = open_library(host, package.functions, kernels)
    return functions, libraries[0]


class EmulatedGpu(Cpu):
    """The device of packages for GPUs: its memory is the CPU's, and kernels are emulated."""

    def functions(self, package: Package) -> Mapping[str, Any]:
        return _functions(package)[0]
