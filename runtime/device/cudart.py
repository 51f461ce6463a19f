"""Functions of the CUDA runtime, by ctypes."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from moec.runtime.device.library import tvm_ffi

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
