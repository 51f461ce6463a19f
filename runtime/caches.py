"""What texts keep from one call of `decode` to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moec.runtime.dtypes import NUMPY, Array
from moec.runtime.package import Port, grows
from moec.runtime.tensors import empty, from_numpy, to_numpy


@dataclass(frozen=True, eq=False)
class Cache:
    """What texts keep from chunk to chunk: the same memory for numpy and for compiled code, which
    takes it anew for each token."""

    array: Array
    tensor: Any

    @staticmethod
    def of(shape: tuple[int, ...], dtype: Any) -> Cache:
        array = empty(shape, dtype)
        return Cache(array, from_numpy(array))


def caches_of(ports: Sequence[Port], texts: int, room: int) -> list[Cache]:
    """Fresh caches for some texts of at most `room` tokens each."""
    return [_cache(port, texts, room) for port in ports]


def _cache(port: Port, texts: int, room: int) -> Cache:
    inner = [room if isinstance(size, str) else size for size in port.shape[1:]]
    cache = Cache.of((texts, *inner), NUMPY[port.dtype])
    if not grows(port):
        cache.array[...] = 0
    return cache


def keep(caches: Sequence[Cache], ports: Sequence[Port], after: Sequence[Any]) -> None:
    """What a call leaves in caches that are not written in place."""
    for port, cache, result in zip(ports, caches, after, strict=True):
        if not grows(port):
            cache.array[...] = to_numpy(result, port)
