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
from moec.runtime.package import NARROW_KINDS
from moec.runtime.process.pool import address

OPEN, CLOSE = "moec_store_open", "moec_store_close"
COUNTS, DISTRUST = "moec_store_counts", "moec_store_distrust"
DIGEST = 32
"""Bytes of a SHA-256."""
SHORTER, ALTERED = -1, -2
"""Errors of a read that are not the system's: the file is shorter than before, or its content is
not what was written."""
POLICIES = ("lru", "lfu", "slru")
PREDICT = ("never", "always", "measured")
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
class NarrowPiece:
    """The narrow copies of the first piece of a stack, which has `elements` of the dtype `kind` for
    an expert; the rest as in PieceOfFile."""

    start: int
    expert_bytes: int
    elements: int
    kind: str
    digests: bytes
    file: int


@dataclass(frozen=True)
class StackInSlots:
    """A stack of the layer whose first stack has the number `first`, of `count` stacks."""

    layer: int
    first: int
    count: int
    experts: int
    slots: int
    pieces: tuple[PieceOfFile, ...]
    narrow: NarrowPiece | None = None


@dataclass(frozen=True)
class StoreOptions:
    """`readers`: threads that read, 0 for as many as suit. `half_life`: the calls of a layer after
    which the use of an expert counts half (lfu). `predict`: whether experts that the next layer is
    expected to choose are read early; `measured`: where steps that do so are faster. `narrow`: the
    greatest share of each layer's routing weight that narrow copies of experts may carry."""

    readers: int = 0
    policy: str = "lfu"
    half_life: int = 64
    predict: str = "measured"
    narrow: float = 0.0


@dataclass(frozen=True)
class StoreCounts:
    """What a store did: calls of layers, experts that they needed, those of them that were in
    slots, bytes read, and seconds of reading and of waiting, summed over threads. Of the experts
    that a layer was expected to need (`guesses`), those that it needed (`right`), needed ones that
    were being read or in slots for a guess (`early`), and bytes read for wrong guesses (`vain`).
    Narrow copies that were read, their bytes, and where they may be used, the routing weight of all
    calls and what narrow copies carried of it."""

    calls: int = 0
    visits: int = 0
    hits: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    stall_seconds: float = 0.0
    guesses: int = 0
    right: int = 0
    early: int = 0
    vain: int = 0
    narrow_reads: int = 0
    narrow_bytes: int = 0
    weight: float = 0.0
    narrow_weight: float = 0.0

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


class _Narrow(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("start", "bytes", "elements")),
        ("digests", ctypes.c_char_p),
        ("file", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    )


class _NarrowCounts(ctypes.Structure):
    _fields_ = (
        ("reads", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("weight", ctypes.c_double),
        ("carried", ctypes.c_double),
    )


_FUNCTIONS = ("create_thread", "join_thread", "raise_text", "sha256")


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _FUNCTIONS),
        ("shape", ctypes.POINTER(_Shape)),
        *((name, ctypes.c_int32) for name in ("stacks", "readers", "policy", "half_life")),
        ("narrow", ctypes.POINTER(_Narrow)),
        ("budget", ctypes.c_double),
    )


def options_of(stacks: Sequence[StackInSlots], options: StoreOptions) -> ctypes.Structure:
    """What a store is opened with."""
    process, ffi = ctypes.CDLL(None), ctypes.CDLL(tvm_ffi().libinfo.find_libtvm_ffi())
    functions = (process.pthread_create, process.pthread_join, ffi.TVMFFIErrorSetRaisedFromCStr)
    return _Options(
        *map(address, functions),
        None if (sha256 := hash_function()) is None else address(sha256),
        (_Shape * len(stacks))(*map(_shape, stacks)),
        len(stacks),
        min(options.readers, MOST_READERS),
        POLICIES.index(options.policy),
        options.half_life,
        (_Narrow * len(stacks))(*(_narrow(stack.narrow) for stack in stacks)),
        options.narrow,
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
        opened = options_of(stacks, options)
        self.address: int = function(OPEN)(ctypes.addressof(opened), PREDICT.index(options.predict))
        if not self.address:
            raise ArtifactError("the system gives the store of experts no memory, or no thread")
        self._read_counts, self._distrust = function(COUNTS), function(DISTRUST)
        self._total = StoreCounts()
        self._failed: FailedRead | None = None
        pieces = [piece for stack in stacks for piece in (*stack.pieces, stack.narrow)]
        digests = [piece.digests for piece in pieces if piece is not None]
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
        guesses, narrow = (ctypes.c_int64 * 4)(), _NarrowCounts()
        to = [ctypes.addressof(memory) for memory in (raw, failure, guesses, narrow)]
        self._read_counts(self.address, *to)
        calls, visits, hits, size, read, stalled = raw
        weights = (narrow.reads, narrow.bytes, narrow.weight, narrow.carried)
        counts = (calls, visits, hits, size, read / 1e9, stalled / 1e9, *guesses, *weights)
        self._total += StoreCounts(*counts)
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


def _narrow(piece: NarrowPiece | None) -> _Narrow:
    if piece is None:
        return _Narrow()
    kind = tuple(NARROW_KINDS).index(piece.kind)
    return _Narrow(piece.start, piece.expert_bytes, piece.elements, piece.digests, piece.file, kind)


def _close(close: Any, store: int, *memory: Any) -> None:
    """Readers use the memory until they have ended."""
    close(store)
