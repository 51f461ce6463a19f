"""The device of a model: the CPU, or a GPU ("cuda", which is the first one, or "cuda:1")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

from moec.errors import ArtifactError, InputError, MoecError, UsageError
from moec.runtime.artifact.artifact import Artifact
from moec.runtime.checks import free_memory
from moec.runtime.device.library import open_library
from moec.runtime.device.tensors import empty, from_numpy
from moec.runtime.dtypes import NUMPY
from moec.runtime.package import Package, Port

CPU, CUDA = "cpu", "cuda"


class Device(Protocol):
    """The interface of a device for an executor. Tensors are TVM tensors.

    `takes` is the device of a call's inputs (torch's name).
    """

    @property
    def kind(self) -> str: ...
    @property
    def takes(self) -> str: ...
    def functions(self, package: Package) -> Mapping[str, Any]: ...
    def reserve(self, size: int) -> None: ...
    def check_caches(self, size: int) -> None: ...
    def free_memory(self) -> int: ...
    def moved(self, tensor: Any, into: Any = None) -> Any: ...
    def to_host(self, tensor: Any) -> Any: ...
    def arguments(self, tensors: Sequence[Any]) -> list[Any]: ...
    def destination(self, port: Port, shape: tuple[int, ...], before: Any) -> Any: ...
    def results(self, tensors: Sequence[Any], destinations: Mapping[int, Any]) -> list[Any]: ...
    def running(self) -> AbstractContextManager[Any]: ...
    def refusal(self, line: str) -> MoecError: ...


class Cpu:
    """The CPU: no tensor is moved."""

    kind = takes = CPU

    def functions(self, package: Package) -> Mapping[str, Any]:
        """Raises ArtifactError where the library does not load."""
        return open_library(package.library, package.functions)

    def reserve(self, size: int) -> None:
        """Nothing: the system provides memory on first access."""

    def check_caches(self, size: int) -> None:
        """Nothing, as for weights."""

    def free_memory(self) -> int:
        """Bytes."""
        return free_memory()

    def moved(self, tensor: Any, into: Any = None) -> Any:
        """The tensor on this device; where it has to be copied, into that one of its shape."""
        return tensor

    def to_host(self, tensor: Any) -> Any:
        """The tensor in memory of the CPU."""
        return tensor

    def arguments(self, tensors: Sequence[Any]) -> list[Any]:
        """The inputs of a call, on this device."""
        return list(tensors)

    def destination(self, port: Port, shape: tuple[int, ...], before: Any) -> Any:
        """Memory for an output; `before` is that of the latest call, or None."""
        return from_numpy(empty(shape, NUMPY[port.dtype]))

    def results(self, tensors: Sequence[Any], destinations: Mapping[int, Any]) -> list[Any]:
        """The results of a call, on the caller's device. `destinations` are those that the call
        wrote into memory of `destination`, by index."""
        return list(tensors)

    def running(self) -> AbstractContextManager[Any]:
        """The context of each call."""
        return nullcontext()

    def refusal(self, line: str) -> MoecError:
        """The error for a message of compiled code."""
        return InputError(f"the compiled code rejects these inputs: {line}")


def device_of(name: str, *, copies: bool = False) -> Device:
    """The device of that name. With `copies`, inputs and results of a GPU are in CPU memory.

    Raises UsageError for another name.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise UsageError(f"unknown device {name!r}: name cpu, cuda or a GPU such as cuda:1")
    if name == CPU:
        return Cpu()
    from moec.runtime.device.gpu import GpuDevice

    return GpuDevice(int(match[1] or 0), copies)


def default_device(package: Package, *, copies: bool = False) -> Device:
    """The default device for the code of a package; `copies` as in `device_of`."""
    return device_of(_kind(package), copies=copies)


def only_for(opened: Artifact, device: Device) -> Artifact:
    """The artifact with only its code for the device. Raises ArtifactError where it has none."""
    for package in (opened.package, opened.for_gpu):
        if package is not None and _kind(package) == device.kind:
            return replace(opened, package=package, for_gpu=None)
    where = "a CPU" if device.kind == CPU else "a GPU"
    raise ArtifactError(
        f"{opened.path} was compiled for {opened.manifest.target_name} and has no code for "
        f"{where}: compile the model for both, with --target cpu,cuda:sm_80 or another GPU"
    )


def _kind(package: Package) -> str:
    return CPU if package.gpu is None else CUDA
