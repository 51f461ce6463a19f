"""Kernels of a GPU, joined to the library that launches them when it is loaded.

TVM's runtime takes the machine code as it is, with what each launch gives to a kernel. Nothing of
CUDA is loaded before a package with kernels is opened for a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from moec.errors import TargetError
from moec.runtime.library import tvm_ffi
from moec.runtime.package import GpuCode
from moec.target import nvidia

_CREATE = "ffi.Module.create.cuda"


def kernels(code: GpuCode, index: int = 0) -> Callable[[Any], None]:
    """What imports the kernels into a library, for the GPU of that index.

    Raises TargetError, in one sentence, where this machine cannot run them.
    """
    content = code.parts[f"{arch_for(code, index)}.cubin"]
    _load_runtime()
    return partial(_import, code=code, content=content)


def arch_for(code: GpuCode, index: int) -> str:
    """The newest architecture of those compiled for that the GPU runs. Raises TargetError."""
    driver = nvidia.driver()
    if driver is None or not driver.gpus:
        reason = nvidia.NO_DRIVER if driver is None else "the NVIDIA driver finds no GPU"
        raise TargetError(f"the kernels of this model are for {code.target}, and {reason}")
    if index >= len(driver.gpus):
        raise TargetError(f"there is no GPU {index}: this machine has {len(driver.gpus)}")
    gpu = driver.gpus[index]
    archs = [name.removesuffix(".cubin") for name in code.parts if name.endswith(".cubin")]
    usable = [arch for arch in archs if nvidia.runs(arch, gpu.capability)]
    if not usable:
        raise TargetError(
            f"the kernels of this model are for {code.target}, and {gpu.name} has compute "
            f"capability {gpu.digits}: compile the model for it"
        )
    return max(usable, key=nvidia.capability_of)


@cache
def _load_runtime() -> None:
    """TVM's runtime for CUDA, into the process. Raises TargetError where it does not load."""
    ffi = tvm_ffi()
    package = importlib.util.find_spec("tvm")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        raise TargetError(f"TVM's runtime for CUDA does not load: {error}") from error
    if ffi.get_global_func(_CREATE, allow_missing=True) is None:
        raise TargetError("TVM's runtime for CUDA is loaded and lacks what opens kernels")


def copied_to(tensor: Any, device: int) -> Any:
    """The same numbers in memory of the first device of a kind, as DLPack numbers them."""
    ffi = tvm_ffi()
    allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    copy = allocate(ffi.Shape(tensor.shape), tensor.dtype, ffi.Device(device, 0), None)
    ffi.get_global_func("runtime.TVMTensorCopyFromTo")(tensor, copy)
    return copy


def _import(host: Any, code: GpuCode, content: bytes) -> None:
    ffi = tvm_ffi()
    functions = {
        launch.name: {
            "name": launch.name,
            "arg_types": list(launch.arguments),
            "launch_param_tags": list(launch.sizes),
        }
        for launch in code.launches
    }
    text = json.dumps({"tvm_version": "0.1.0", "func_info": functions})
    described = ffi.get_global_func("runtime.LoadMetaDataFromJSON")(text)
    host.import_module(ffi.get_global_func(_CREATE)(content, "cubin", described, {}))
