"""Repeats a call on a GPU as a CUDA graph: one launch instead of one per kernel.

The stream of the graph waits for copies on CUDA's default stream, and these for the graph, as it
was created without cudaStreamNonBlocking (CUDA C++ Programming Guide, Default Stream).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from moec.runtime.device.library import tvm_ffi

CUDART = "libcudart.so.13"  # what TVM's runtime is linked with
WARM = 2
"""Calls after which one allocates nothing: TVM's virtual machine frees the results of a call in the
next, and keeps the memory in a pool."""
_ON_DEVICE = 3  # cudaMemcpyDeviceToDevice
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may allocate meanwhile


class RepeatedCall:
    """The latest call whose kernels have the same arguments each time, on GPU `index`.

    Raises RuntimeError where CUDA refuses.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._key: Hashable = None
        self._calls = 0
        self._results: Any = None
        self._stream, self._graph = ctypes.c_void_p(), ctypes.c_void_p()

    def run(self, key: Hashable, call: Callable[[], Any]) -> Any:
        """The results of call(). `key` are the addresses of its arguments: the third call with one
        key is captured, and launched from then on, into the same results."""
        if key != self._key:
            self._forget()
            self._key = key
        if self._calls < WARM:
            self._calls += 1
            return call()
        if not self._graph:
            self._capture(call)
        cuda("cudaGraphLaunch", self._graph, self._stream)
        return self._results

    def _capture(self, call: Callable[[], Any]) -> None:
        if not self._stream:
            cuda("cudaSetDevice", self._index)
            cuda("cudaStreamCreate", ctypes.byref(self._stream))
        graph = ctypes.c_void_p()
        ffi = tvm_ffi()
        with ffi.use_raw_stream(ffi.device(f"cuda:{self._index}"), self._stream.value):
            cuda("cudaStreamBeginCapture", self._stream, _THREAD_LOCAL)
            try:
                self._results = call()
            finally:
                cuda("cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        cuda("cudaGraphInstantiate", ctypes.byref(self._graph), graph, ctypes.c_ulonglong(0))
        cuda("cudaGraphDestroy", graph)
        self._release = weakref.finalize(self, cuda, "cudaGraphExecDestroy", self._graph)

    def _forget(self) -> None:
        if self._graph:
            self._release()
        self._results, self._graph, self._calls = None, ctypes.c_void_p(), 0


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
