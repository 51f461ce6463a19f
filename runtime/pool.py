"""Parallel loops of all loaded libraries share one pool of threads, that of codegen/cpu/pool.c.

TVM's pool gives each of its threads one task of a loop and waits for all of them. Where another
process keeps a core busy, that is for as long as the system lets the other process run, and every
loop waits anew. In ours, whoever runs claims the next task.

Each library carries the pool's code, since a process that only runs models has no compiler. The
first one that is loaded gives it to all, and is never unloaded: its threads are in it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

NAME = "moec_pool_1"
"""What a library calls its pool; another pool, or another way to use it, has another number."""
_POOLS: dict[str, ctypes.CDLL] = {}


def share_pool(module: Any, path: Path) -> None:
    """Let the loops of a library, the `module` that was loaded from `path`, use the pool.

    Those of a library without one (compiled by an older moec, or not for Linux) use TVM's; so do
    all where TVM_BIND_THREADS asks for threads that are tied to cores.
    """
    if os.environ.get("TVM_BIND_THREADS") == "1" or not module.implements_function(NAME):
        return
    pool = _POOLS.get(NAME) or _POOLS.setdefault(NAME, _opened(path))
    module[NAME](address(pool.moec_pool_launch))


def _opened(path: Path) -> ctypes.CDLL:
    pool = connected(ctypes.CDLL(str(path)))  # which is what keeps it loaded
    os.register_at_fork(after_in_child=pool.moec_pool_forked)
    return pool


def connected(pool: ctypes.CDLL) -> ctypes.CDLL:
    """A pool that has the functions it needs."""
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
