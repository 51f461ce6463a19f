"""TVM's first error reads the symbols of few libraries.

An error of TVM names the C++ functions that it came through. For the first one, TVM reads the
symbols of all libraries that the process has loaded until then, once; and `import tvm` raises and
catches such errors. After torch this takes half a second, before torch a third of that. Functions
of libraries that are loaded later have no names then, as only developers of TVM need them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread


@contextmanager
def symbols_read() -> Iterator[None]:
    """While libraries are imported, a thread reads the symbols of those that are loaded now.

    Does nothing without TVM, or if MOEC_DEBUG is 1.
    """
    read = None if os.environ.get("MOEC_DEBUG") == "1" else _reader()
    if read is None:
        yield
        return
    # ctypes releases the interpreter's lock.
    thread = Thread(target=read, args=(None, 0, None, 0), name="moec-symbols", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _reader() -> Callable[..., object] | None:
    """The function that describes where it is called; None for a TVM that has no such function."""
    spec = importlib.util.find_spec("tvm_ffi")  # not an import, which would import torch
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        with suppress(OSError, AttributeError):
            function: Callable[..., object] = ctypes.CDLL(
                str(Path(folder) / "lib" / "libtvm_ffi.so")
            ).TVMFFIBacktrace
            return function
    return None
