"""A model on a GPU: its kernels are linked to the library that launches them when it is loaded.

TVM's runtime takes the machine code, with a description of the arguments of each launch. CUDA is
not loaded before a package with GPU kernels is opened for a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from moec.errors import ArtifactError, InputError, MoecError, TargetError
from moec.runtime.checks import show_bytes
from moec.runtime.device.library import CPU, CUDA, open_library, tvm_ffi
from moec.runtime.device.tensors import arguments_of
from moec.runtime.dtypes import NUMPY
from moec.runtime.package import CUBIN, HOST_CODE, PTX, TENSOR_MAP, GpuCode, Package, Port
from moec.target import nvidia

CUDART = "libcudart.so.13"  # what TVM's runtime is linked with
_ON_DEVICE = 3  # cudaMemcpyDeviceToDevice


def copy_on_stream(source: Any, to: Any) -> None:
    """Copies a tensor to one of its size on the same GPU, on the current stream; TVM's own copy is
    on the default stream."""
    ffi = tvm_ffi()
    size = math.prod(source.shape) * ffi.dtype(str(source.dtype)).itemsize
    pointers = map(ctypes.c_void_p, (to.data_ptr(), source.data_ptr()))
    stream = ctypes.c_void_p(ffi.get_raw_stream(source.device))
    cuda("cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), _ON_DEVICE, stream)


def cuda(name: str, *arguments: Any) -> None:
    """Calls a function of the CUDA runtime. Raises RuntimeError where it fails."""
    runtime = ctypes.CDLL(CUDART)
    if error := getattr(runtime, name)(*arguments):
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        text = runtime.cudaGetErrorString(error).decode()
        raise RuntimeError(f"CUDA: {name} fails: {text}")


_CREATE = "ffi.Module.create.cuda"


@dataclass(frozen=True)
class GpuDevice:
    """The GPU of that index, as `moec.runtime.device.device.Device`.

    Calls take torch tensors on this GPU and return such, without a copy, on torch's stream. With
    `copies` they take and return arrays in CPU memory, and need no torch. `memory` is the device
    type of DLPack.
    """

    index: int = 0
    copies: bool = False
    memory: int = CUDA
    kind: str = "cuda"

    @property
    def takes(self) -> str:
        return "cpu" if self.copies else f"cuda:{self.index}"

    def functions(self, package: Package) -> Mapping[str, Any]:
        """Raises TargetError where this machine cannot run them, ArtifactError where they do not
        load."""
        assert package.gpu is not None
        part = part_for(package.gpu, self.index)
        join, host = kernels(package.gpu, part), package.gpu.parts.get(_arch(part) + HOST_CODE, b"")
        return open_library(host, package.functions, join, (self.memory, self.index))

    def reserve(self, size: int) -> None:
        """Raises TargetError where so many bytes of weights do not fit."""
        free = self.free_memory()
        if size > free:
            raise TargetError(
                f"the weights take {show_bytes(size)}, and {show_bytes(free)} of memory are free "
                f"on GPU {self.index}: free some of it, or compile the model for a CPU"
            )

    def check_caches(self, size: int) -> None:
        """Nothing: the allocation fails where so many bytes do not fit."""

    def free_memory(self) -> int:
        return nvidia.free_memory(self.index)

    def moved(self, tensor: Any, into: Any = None) -> Any:
        if into is None or tuple(into.shape) != tuple(tensor.shape):
            return copied_to(tensor, self.memory, self.index)
        tvm_ffi().get_global_func("runtime.TVMTensorCopyFromTo")(tensor, into)
        return into

    def to_host(self, tensor: Any) -> Any:
        return copied_to(tensor, CPU, 0)

    def arguments(self, tensors: Sequence[Any]) -> list[Any]:
        return [self.moved(tensor) if self.copies else tensor for tensor in tensors]

    def destination(self, port: Port, shape: tuple[int, ...], before: Any) -> Any:
        """Torch's memory. With copies, the memory of the latest call if it has the shape."""
        dtype = NUMPY[port.dtype].name
        if not self.copies:
            return empty_in_torch(shape, dtype, self.takes)
        if before is not None and tuple(before.shape) == shape:
            return before
        return allocated(shape, dtype, self.memory, self.index)

    def results(self, tensors: Sequence[Any], destinations: Mapping[int, Any]) -> list[Any]:
        """In torch's memory, not in that of TVM's pool: a call allocates nothing there once another
        has had the same sizes, whatever the caller keeps of its results. Those that kernels have
        not written there are copied."""
        if self.copies:
            return [self.to_host(tensor) for tensor in tensors]
        results = []
        for index, tensor in enumerate(tensors):
            if (result := destinations.get(index)) is None:
                result = empty_in_torch(tensor.shape, str(tensor.dtype), self.takes)
                copy_on_stream(tensor, result)
            results.append(result)
        return results

    def running(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = (
            nullcontext() if self.copies else tvm_ffi().use_torch_stream()
        )
        return context

    def refusal(self, line: str) -> MoecError:
        """A TargetError for a failure of CUDA, an InputError if the call needs too much memory."""
        if "out of memory" in line:
            return InputError(
                f"GPU {self.index} has too little memory for this call: give fewer or shorter "
                "inputs at once"
            )
        if "CUDA" in line:
            return TargetError(f"GPU {self.index} failed: {line}")
        return InputError(f"the compiled code rejects these inputs: {line}")


def kernels(code: GpuCode, part: str) -> Callable[[Any], None]:
    """A function that imports the kernels of a cubin or PTX among the parts into a library.

    Raises TargetError where this machine has no runtime for them, ArtifactError where machine code
    is not that of the kernels.
    """
    if _arch(part) not in code.launches:
        raise ArtifactError(f"{part} has kernels that nothing launches; compile the model again")
    for launch in code.launches[_arch(part)]:
        if launch.name.encode() not in code.parts[part]:
            raise ArtifactError(
                f"{part} does not fit the library: it lacks the kernel {launch.name}; compile the "
                "model again"
            )
    load_runtime()
    return partial(import_kernels, code=code, part=part)


def _arch(part: str) -> str:
    return part.partition(".")[0]


def part_for(code: GpuCode, index: int) -> str:
    """The part with the kernels for a GPU: the cubin of the newest architecture that it runs; PTX
    where it is newer than all. Raises TargetError, in one sentence, where this machine cannot run
    them."""
    driver = nvidia.driver()
    if driver is None or not driver.gpus:
        reason = nvidia.NO_DRIVER if driver is None else "the NVIDIA driver finds no GPU"
        raise TargetError(f"the kernels of this model are for {code.target}, and {reason}")
    if index >= len(driver.gpus):
        raise TargetError(f"there is no GPU {index}: this machine has {len(driver.gpus)}")
    gpu = driver.gpus[index]
    if code.toolkit and _version(driver.version)[:1] < _version(code.toolkit)[:1]:
        raise TargetError(
            f"the kernels of this model were made by CUDA {code.toolkit}, and the NVIDIA driver "
            f"here runs CUDA up to {driver.version}: install a newer driver"
        )
    cubins = [part for part in code.parts if part.endswith(CUBIN)]
    usable = [part for part in cubins if nvidia.runs(_arch(part), gpu.capability)]
    texts = [part for part in code.parts if part.endswith(PTX)]
    later = [part for part in texts if _capability(part) <= gpu.capability]
    if not usable and not later:
        raise TargetError(
            f"the kernels of this model are for {code.target}, and {gpu.name} has compute "
            f"capability {gpu.digits}: compile the model for it"
        )
    if not usable and _version(driver.version) < _version(code.toolkit):
        raise TargetError(
            f"{gpu.name} needs the PTX of this model, of CUDA {code.toolkit}, and the NVIDIA "
            f"driver here compiles that of CUDA up to {driver.version}: install a newer driver"
        )
    return max(usable or later, key=_capability)


def _capability(part: str) -> tuple[int, int]:
    return nvidia.capability_of(_arch(part))


def _version(text: str) -> list[int]:
    """Major and minor version. A driver runs cubins of every toolkit of its major version, and
    compiles PTX of those that are not newer (NVIDIA, CUDA Compatibility, section 2)."""
    return [int(digits) for digits in text.split(".")[:2]]


@cache
def load_runtime() -> None:
    """Load TVM's runtime for CUDA into the process, with the CUDA runtime of a wheel if there is
    one. Raises TargetError where it does not load."""
    ffi = tvm_ffi()
    for folder in nvidia.wheels():
        library = Path(folder, "lib", CUDART)
        if library.exists():
            ctypes.CDLL(str(library))
    package = importlib.util.find_spec("tvm")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        hint = f"; pip install 'moec[cuda]' brings {CUDART}" if CUDART in str(error) else ""
        raise TargetError(f"TVM's runtime for CUDA fails to load: {error}{hint}") from error
    if ffi.get_global_func(_CREATE, allow_missing=True) is None:
        raise TargetError("TVM's runtime for CUDA lacks the loader of kernels")


def empty_in_torch(shape: Sequence[int], dtype: str, device: str) -> Any:
    """Memory of torch, as a TVM tensor. `dtype` and `device` are torch's names."""
    torch = sys.modules["torch"]  # which the caller's inputs are of
    memory = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=device)
    (tensor,), _ = arguments_of([memory])
    return tensor


def copied_to(tensor: Any, memory: int, index: int) -> Any:
    """A copy of the tensor in memory of that type (DLPack's device types), on device `index`."""
    copy = allocated(tensor.shape, str(tensor.dtype), memory, index)
    tvm_ffi().get_global_func("runtime.TVMTensorCopyFromTo")(tensor, copy)
    return copy


def allocated(shape: Sequence[int], dtype: str, memory: int, index: int) -> Any:
    """A tensor in memory of that type, as in `copied_to`."""
    ffi = tvm_ffi()
    allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    return allocate(ffi.Shape(shape), ffi.dtype(dtype), ffi.Device(memory, index), None)


def import_kernels(host: Any, code: GpuCode, part: str) -> None:
    ffi = tvm_ffi()
    functions = {
        launch.name: {
            "name": launch.name,
            "arg_types": ["handle" if a == TENSOR_MAP else a for a in launch.arguments],
            # 1: TVM passes what the handle points to.
            "arg_extra_tags": [int(a == TENSOR_MAP) for a in launch.arguments],
            "launch_param_tags": list(launch.sizes),
        }
        for launch in code.launches[_arch(part)]
    }
    text = json.dumps({"tvm_version": "0.1.0", "func_info": functions})
    described = ffi.get_global_func("runtime.LoadMetaDataFromJSON")(text)
    form = part.rpartition(".")[2]
    host.import_module(ffi.get_global_func(_CREATE)(code.parts[part], form, described, {}))
