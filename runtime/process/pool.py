"""Parallel loops of all loaded libraries share one pool of threads, codegen/cpu/pool.c.

TVM's pool gives each of its threads one task of a loop and waits for all of them. If another
process keeps a core busy, each loop waits until the system preempts that process. In this pool, a
thread that runs claims the next task.

Each library contains the pool's code, since a process that only runs models has no compiler. The
first library that is loaded provides the pool for all, and is never unloaded, as its threads run
its code.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from moec.errors import UsageError
from moec.runtime.process.threads import check_threads, set_threads

NAME = "moec_pool_1"
"""The symbol of a library's pool. The number changes with the pool or its interface."""
POOLS: dict[str, ctypes.CDLL] = {}


def set_pool_threads(count: int) -> None:
    """Let the kernels of this process use `count` threads.

    Raises UsageError where `count` is not positive, or a model was loaded with another number.
    """
    check_threads(count)
    current = os.environ.get("TVM_NUM_THREADS")
    if POOLS and current != str(count):
        raise UsageError(
            f"threads: {count}, and the models of this process share a pool of {current}: give the "
            "number when the first model is loaded"
        )
    set_threads(count)


def share_pool(module: Any, path: Path) -> None:
    """Let the loops of a library, the `module` that was loaded from `path`, use the pool.

    A library without a pool (compiled by an older moec, or not for Linux) uses TVM's; so do all
    libraries where TVM_BIND_THREADS requests threads that are bound to cores.
    """
    if os.environ.get("TVM_BIND_THREADS") == "1" or not module.implements_function(NAME):
        return
    pool = POOLS.get(NAME) or POOLS.setdefault(NAME, _opened(path))
    module[NAME](address(pool.moec_pool_launch))


def _opened(path: Path) -> ctypes.CDLL:
    pool = connected(ctypes.CDLL(str(path)))  # which is what keeps it loaded
    os.register_at_fork(after_in_child=pool.moec_pool_forked)
    return pool


def connected(pool: ctypes.CDLL) -> ctypes.CDLL:
    """Gives a pool the functions of TVM that it calls."""
    import tvm_ffi

    process, ffi = ctypes.CDLL(None), ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    functions = (
        process.pthread_create,
        process.pthread_detach,
        ffi.TVMFFIErrorMoveFromRaised,
        ffi.TVMFFIErrorSetRaised,
        ffi.TVMFFIErrorSetRaisedFromCStr,
        ffi.TVMFFIObjectDecRef,
    )
    pool.moec_pool_connect((ctypes.c_void_p * len(functions))(*map(address, functions)))
    return pool


def address(function: Any) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value is not None
    return value
