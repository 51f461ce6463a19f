"""Conversions between numpy arrays, torch tensors and TVM tensors that share memory.

Nothing is copied if the memory is contiguous and aligned to `ALIGNMENT` bytes, as kernels require.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from moec.runtime.device.library import tvm_ffi
from moec.runtime.dtypes import NUMPY, Array
from moec.runtime.package import Port

ALIGNMENT = 64  # bytes: what kernels assume of every address


def arguments_of(inputs: Sequence[Any]) -> tuple[list[Any], Any]:
    """The inputs as TVM tensors, and the module torch if any of them is a torch tensor, or where it
    is imported if there are none."""
    torch = sys.modules.get("torch")
    arguments, kind = [], None if inputs else torch
    for value in inputs:
        if torch is not None and isinstance(value, torch.Tensor):
            kind = torch
            arguments.append(_from_torch(value, torch))
        else:
            arguments.append(from_numpy(np.asarray(value)))
    return arguments, kind


def _from_torch(value: Any, torch: Any) -> Any:
    """A TVM tensor that shares the memory if possible."""
    tensor = value.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.contiguous()
    if tensor.data_ptr() % ALIGNMENT:
        tensor = tensor.clone()
    return _compact(tvm_ffi().from_dlpack(tensor))


def from_numpy(array: Array) -> Any:
    if array.dtype == NUMPY["c64"]:
        array = array[..., None].view(np.float32)
    aligned = array.ctypes.data % ALIGNMENT == 0 or array.size == 0
    if not (aligned and array.flags.c_contiguous and array.flags.writeable):
        array = aligned_copy(array)  # DLPack has no way to say that memory is read-only
    if array.dtype == NUMPY["bf16"]:  # numpy exports it as nothing at all
        return _view(tvm_ffi().from_dlpack(array.view(np.uint16)), "bfloat16")
    return _compact(tvm_ffi().from_dlpack(array))


def aligned_copy(array: Array) -> Array:
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array at an address that kernels accept."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    array: Array = room[start : start + nbytes].view(dtype).reshape(shape)
    return array


def results_of(result: Any, count: int) -> list[Any]:
    """The results of a function of the library as a list, without TVM's slow container classes."""
    if hasattr(result, "data_ptr"):
        return [result]
    item = tvm_ffi().get_global_func("ffi.ArrayGetItem")
    return [item(result, index) for index in range(count)]


def _compact(tensor: Any) -> Any:
    """The same memory with the strides that compiled code checks.

    For axes of size 1, and of empty tensors, numpy and torch may report any strides.
    """
    compact_stride = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if stride != compact_stride:
            return _view(tensor, tensor.dtype)
        compact_stride *= size
    return tensor


def _view(tensor: Any, dtype: str) -> Any:
    """The same memory as `dtype`, with strides as in `_compact`."""
    ffi = tvm_ffi()
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    return view(tensor, ffi.Shape(tensor.shape), ffi.dtype(dtype), 0)


def to_numpy(tensor: Any, port: Port) -> Array:
    bf16 = port.dtype == "bf16"
    array: Array = np.from_dlpack(_view(tensor, "uint16") if bf16 else tensor)
    if port.dtype == "c64":
        return array.view(np.complex64)[..., 0]
    return array.view(NUMPY["bf16"]) if bf16 else array


def to_caller(tensor: Any, port: Port, torch: Any, copied: bool) -> Any:
    if torch is None:
        array = to_numpy(tensor, port)
        return array.copy() if copied or not array.flags.writeable else array
    result = torch.from_dlpack(tensor.__dlpack__())  # of the capsule torch asks no more
    if port.dtype == "c64":
        result = torch.view_as_complex(result)
    return result.clone() if copied else result
