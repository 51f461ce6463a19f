"""The caches of texts between calls of `decode`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.runtime.device.device import Cpu, Device
from moec.runtime.device.library import tvm_ffi
from moec.runtime.device.tensors import empty, from_numpy
from moec.runtime.dtypes import NUMPY, Array
from moec.runtime.package import Port, grows


@dataclass(frozen=True, eq=False)
class Cache:
    """What texts keep from chunk to chunk: memory of the device, which compiled code takes anew
    for each token."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def caches_of(
    ports: Sequence[Port], texts: int, room: int, device: Device | None = None
) -> list[Cache]:
    """Fresh caches for some texts of at most `room` tokens each; on the CPU unless `device` says
    otherwise."""
    return [_cache(port, texts, room, device or Cpu()) for port in ports]


def bytes_of_caches(ports: Sequence[Port], texts: int, room: int) -> int:
    """Those of `caches_of`."""
    sizes = [[room if isinstance(n, str) else n for n in port.shape[1:]] for port in ports]
    each = [math.prod(n) * NUMPY[p.dtype].itemsize for n, p in zip(sizes, ports, strict=True)]
    return texts * sum(each)


def _cache(port: Port, texts: int, room: int, device: Device) -> Cache:
    inner = [room if isinstance(size, str) else size for size in port.shape[1:]]
    array = empty((texts, *inner), NUMPY[port.dtype])
    if not grows(port):
        array[...] = np.zeros((), array.dtype)
    return Cache(device.moved(from_numpy(array)))


def keep(caches: Sequence[Cache], ports: Sequence[Port], after: Sequence[Any]) -> None:
    """Copy the results of a call to the caches that are not updated in place."""
    for port, cache, result in zip(ports, caches, after, strict=True):
        if not grows(port):
            _copy(result, cache.tensor)


def copy_text(source: Cache, text: int, to: Cache, number: int) -> None:
    """What the text of that number keeps, into the place of another."""
    _copy(_text(source, text), _text(to, number))


def copy_tokens(
    port: Port, source: Cache, text: int, to: Cache, number: int, tokens: int, start: int = 0
) -> None:
    """As `copy_text`, but of a cache that grows only the entries `start` to `tokens` of a head."""
    old, new = _text(source, text), _text(to, number)
    if not grows(port) or (not start and tokens == old.shape[1]):
        _copy(old, new)
        return
    for head in range(old.shape[0] if start < tokens else 0):
        _copy(_entries(old, head, start, tokens), _entries(new, head, start, tokens))


def first_texts(caches: Sequence[Cache], count: int) -> list[Cache]:
    """The caches of the first `count` texts, which share the memory."""
    return [Cache(_view(c.tensor, (count, *c.shape[1:]), 0)) for c in caches]


def token_arrays(ports: Sequence[Port], caches: Sequence[Cache]) -> list[Array]:
    """The memory [texts, heads, room, width] of caches that grow, on the CPU, as integers of the
    size of their elements."""
    ffi, arrays = tvm_ffi(), []
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    for port, cache in zip(ports, caches, strict=True):
        assert grows(port)
        integer = ffi.dtype(f"int{8 * NUMPY[port.dtype].itemsize}")
        arrays.append(np.from_dlpack(view(cache.tensor, ffi.Shape(cache.shape), integer, 0)))
    return arrays


def _text(cache: Cache, number: int) -> Any:
    """The part of one text, which shares the memory."""
    shape = cache.shape[1:]
    return _view(cache.tensor, shape, number * math.prod(shape))


def _entries(text: Any, head: int, start: int, stop: int) -> Any:
    """The entries `start` to `stop` of one head of a part [heads, room, width]."""
    _, room, width = text.shape
    return _view(text, (stop - start, width), (head * room + start) * width)


def _view(tensor: Any, shape: Sequence[int], start: int) -> Any:
    """Elements of a tensor from `start` on, in its memory."""
    ffi = tvm_ffi()
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    dtype = ffi.dtype(str(tensor.dtype))
    return view(tensor, ffi.Shape(shape), dtype, start * dtype.itemsize)


def _copy(source: Any, to: Any) -> None:
    tvm_ffi().get_global_func("runtime.TVMTensorCopyFromTo")(source, to)
