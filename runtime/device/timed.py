"""Opens a library with wrappers around its kernels, which record when they start and end, or what
they are called with.

The virtual machine looks for a kernel in the library, then among TVM's global functions. While it
is created, the library is out of its sight, and the wrappers of its kernels are global functions.
A library that is opened in the ordinary way calls its kernels directly.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.errors import ArtifactError
from moec.runtime.device.library import open_library, tvm_ffi
from moec.runtime.process.pool import address

NAME = "moec_timed_1"
"""The function of a library that returns the address of its wrapper (codegen/cpu/timed.c). The
number changes with its interface."""
ROOM = 1 << 18
"""The most calls between two times that spans are read."""
_WRAPPER = "moec.timed"
_GLOBAL = threading.Lock()
"""Held while wrappers are global functions."""


class _Log(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        ("clock", ctypes.c_void_p),
        ("call", ctypes.c_void_p),
    )


class _Timed(ctypes.Structure):
    _fields_ = (
        ("log", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("number", ctypes.c_int64),
    )


class _Text(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char_p), ("size", ctypes.c_size_t))


@dataclass(eq=False)
class Spans:
    """The start and the end of each call of some functions; the number of a function is its index
    in `names`. Must outlive the calls."""

    names: list[str] = field(default_factory=list)
    _states: list[Any] = field(default_factory=list)  # keep functions, and their wrappers' data

    def __post_init__(self) -> None:
        self._memory = np.zeros((ROOM, 3), np.int64)
        self._ffi = ctypes.CDLL(tvm_ffi().libinfo.find_libtvm_ffi())
        clock, call = ctypes.CDLL(None).clock_gettime, self._ffi.TVMFFIFunctionCall
        self._log = _Log(0, ROOM, self._memory.ctypes.data, address(clock), address(call))

    def take(self) -> NDArray[np.int64]:
        """i64[N, 3] of the calls since the last time, in the order of their starts: start and end
        in nanoseconds of `time.perf_counter_ns`, and the number of the function."""
        count = min(self._log.count, ROOM)
        self._log.count = 0
        return self._memory[:count].copy()

    def wrap(self, name: str, function: Any, wrapper: int) -> Any:
        """The function with spans of its calls, by the library's `wrapper`."""
        number, pointer = len(self.names), ctypes.c_void_p(function.__chandle__())
        state = _Timed(ctypes.addressof(self._log), pointer, number)
        created, text = ctypes.c_void_p(), _Text(_WRAPPER.encode(), len(_WRAPPER))
        call = ctypes.c_void_p(wrapper)
        self._ffi.TVMFFIFunctionCreate(ctypes.byref(state), call, None, ctypes.byref(created))
        self._ffi.TVMFFIFunctionSetGlobal(ctypes.byref(text), created, 1)
        self._ffi.TVMFFIObjectDecRef(created)
        self.names.append(name)
        self._states.append((state, function))
        return tvm_ffi().get_global_func(_WRAPPER)


def open_timed(library: bytes, names: Iterable[str]) -> tuple[Mapping[str, Any], Spans]:
    """The functions `names` of a library for CPUs, with spans of their calls and of the calls of
    kernels in them.

    Raises ArtifactError where it does not load, lacks one of the functions, or has no clock.
    """
    spans, wrappers = Spans(), list[int]()

    def wrap(name: str, kernels: Any) -> Any:
        if not kernels.implements_function(NAME):
            raise ArtifactError(
                "the artifact's library has no clock around its kernels: compile the model again "
                "with this version of moec, for Linux"
            )
        wrappers.append(kernels[NAME]())
        return spans.wrap(name, kernels[name], wrappers[0])

    plain = _opened(library, names, wrap)
    return {name: spans.wrap(name, f, wrappers[0]) for name, f in plain.items()}, spans


def open_watched(
    library: bytes,
    names: Iterable[str],
    watch: Callable[[str, Callable[..., Any], Sequence[Any]], Any],
) -> dict[str, Any]:
    """The functions `names` of a library for CPUs. In place of each call of a kernel, `watch` is
    called with its name, the kernel and the arguments, and calls it.

    Raises ArtifactError where it does not load, or lacks one of the functions.
    """

    def wrap(name: str, kernels: Any) -> Any:
        kernel = kernels[name]

        def watched(*arguments: Any) -> Any:
            return watch(name, kernel, arguments)

        return watched

    return _opened(library, names, wrap)


def _opened(
    library: bytes, names: Iterable[str], wrap: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """The functions `names` of a library, which call what `wrap` returns for the name of a kernel
    and the module of all kernels."""

    @contextmanager
    def wrapped(module: Any) -> Iterator[None]:
        (kernels,) = module.imports
        called = str(module["stats"]()).rpartition("Packed functions")[2]
        inside = [n for n in re.findall(r"\w+", called) if kernels.implements_function(n)]
        wrappers = {name: wrap(name, kernels) for name in inside}
        with _GLOBAL:
            module.clear_imports()
            for name, function in wrappers.items():
                tvm_ffi().register_global_func(name, function, override=True)
            try:
                yield
            finally:
                module.import_module(kernels)
                for name in wrappers:
                    tvm_ffi().registry.remove_global_func(name)

    return open_library(library, names, around=wrapped)
