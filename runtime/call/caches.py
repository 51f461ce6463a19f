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
from moec.runtime.dtypes import NUMPY
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


def _text(cache: Cache, number: int) -> Any:
    """The part of one text, which shares the memory."""
    ffi, tensor = tvm_ffi(), cache.tensor
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    dtype = ffi.dtype(str(tensor.dtype))
    size = math.prod(tensor.shape[1:]) * dtype.itemsize
    return view(tensor, ffi.Shape(tensor.shape[1:]), dtype, number * size)


def _copy(source: Any, to: Any) -> None:
    tvm_ffi().get_global_func("runtime.TVMTensorCopyFromTo")(source, to)
