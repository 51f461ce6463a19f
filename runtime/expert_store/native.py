"""The expert store of a library, codegen/cpu/expert_store.c: its structs, and its functions."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from moec.errors import ArtifactError
from moec.runtime.device.library import tvm_ffi
from moec.runtime.process.pool import address

OPEN, CLOSE = "moec_store_open", "moec_store_close"
COUNTS, DISTRUST = "moec_store_counts", "moec_store_distrust"
DIGEST = 32
"""Bytes of a SHA-256."""
SHORTER, ALTERED = -1, -2
"""Errors of a read that are not the system's: the file is shorter than before, or its content is
not what was written."""
POLICIES = ("lru", "lfu", "slru")
MOST_READERS = 8


@dataclass(frozen=True)
class PieceOfFile:
    """An array of a stack: `start` is its offset in the file with the descriptor `file`, and
    `memory` the address of its slots. `digests` are the SHA-256 of each expert. `direct`: the file
    was opened past the page cache."""

    start: int
    expert_bytes: int
    memory: int
    digests: bytes
    file: int
    direct: bool


@dataclass(frozen=True)
class StackInSlots:
    """A stack of the layer whose first stack has the number `first`, of `count` stacks."""

    layer: int
    first: int
    count: int
    experts: int
    slots: int
    pieces: tuple[PieceOfFile, ...]


@dataclass(frozen=True)
class StoreOptions:
    """`readers`: threads that read, 0 for as many as suit. `half_life`: the calls of a layer after
    which the use of an expert counts half (lfu)."""

    readers: int = 0
    policy: str = "lfu"
    half_life: int = 64


@dataclass(frozen=True)
class StoreCounts:
    """What a store did: calls of layers, experts that they needed, those of them that were in
    slots, bytes read, and seconds of reading and of waiting, summed over threads."""

    calls: int = 0
    visits: int = 0
    hits: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    stall_seconds: float = 0.0

    def __add__(self, other: StoreCounts) -> StoreCounts:
        return StoreCounts(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class FailedRead:
    """`error` is the system's number of the error, SHORTER or ALTERED."""

    stack: int
    expert: int
    error: int


class _Piece(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("memory", ctypes.c_void_p),
        ("digests", ctypes.c_char_p),
        ("file", ctypes.c_int32),
        ("direct", ctypes.c_int32),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in "layer first count experts slots pieces".split()),
        ("piece", ctypes.POINTER(_Piece)),
    )


_FUNCTIONS = ("create_thread", "join_thread", "raise_text", "sha256")


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _FUNCTIONS),
        ("shape", ctypes.POINTER(_Shape)),
        *((name, ctypes.c_int32) for name in ("stacks", "readers", "policy", "half_life")),
    )


class NativeStore:
    """An open store of a library, whose functions `function` returns by name. `memory` is what the
    slots are in."""

    def __init__(
        self,
        function: Callable[[str], Any],
        stacks: Sequence[StackInSlots],
        options: StoreOptions,
        memory: Any,
    ) -> None:
        process, ffi = ctypes.CDLL(None), ctypes.CDLL(tvm_ffi().libinfo.find_libtvm_ffi())
        functions = (
            process.pthread_create,
            process.pthread_join,
            ffi.TVMFFIErrorSetRaisedFromCStr,
        )
        opened = _Options(
            *map(address, functions),
            None if (sha256 := hash_function()) is None else address(sha256),
            (_Shape * len(stacks))(*map(_shape, stacks)),
            len(stacks),
            min(options.readers, MOST_READERS),
            POLICIES.index(options.policy),
            options.half_life,
        )
        self.address: int = function(OPEN)(ctypes.addressof(opened))
        if not self.address:
            raise ArtifactError("the system gives the store of experts no memory, or no thread")
        self._read_counts, self._distrust = function(COUNTS), function(DISTRUST)
        self._total = StoreCounts()
        self._failed: FailedRead | None = None
        digests = [piece.digests for stack in stacks for piece in stack.pieces]
        weakref.finalize(self, _close, function(CLOSE), self.address, memory, digests)

    def counts(self) -> StoreCounts:
        """Since the store was opened."""
        self._read()
        return self._total

    def failed_read(self) -> FailedRead | None:
        """The latest read that failed, told once."""
        self._read()
        failed, self._failed = self._failed, None
        return failed

    def distrust(self) -> None:
        """The file may have changed: what is read from now on is hashed again."""
        self._distrust(self.address)

    def _read(self) -> None:
        raw, failure = (ctypes.c_int64 * 6)(), (ctypes.c_int32 * 3)()
        self._read_counts(self.address, ctypes.addressof(raw), ctypes.addressof(failure))
        calls, visits, hits, size, read, stalled = raw
        self._total += StoreCounts(calls, visits, hits, size, read / 1e9, stalled / 1e9)
        if failure[0] >= 0:
            self._failed = FailedRead(*failure)


@cache
def hash_function() -> Any:
    """OpenSSL's SHA256, from the library that Python's hashlib uses; None where Python has it in
    another form. Experts are then hashed when the model is loaded."""
    try:
        import _hashlib

        return ctypes.CDLL(_hashlib.__file__).SHA256
    except (ImportError, OSError, AttributeError):
        return None


def _shape(stack: StackInSlots) -> _Shape:
    pieces = (_Piece * len(stack.pieces))(
        *(
            _Piece(p.start, p.expert_bytes, p.memory, p.digests, p.file, p.direct)
            for p in stack.pieces
        )
    )
    return _Shape(
        stack.layer, stack.first, stack.count, stack.experts, stack.slots, len(pieces), pieces
    )


def _close(close: Any, store: int, *memory: Any) -> None:
    """Readers use the memory until they have ended."""
    close(store)
