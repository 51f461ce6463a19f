"""Tensors kept in a file that has no name: it is gone with the process."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.errors import SetupError
from moec.runtime.checks import show_bytes
from moec.runtime.dtypes import Array
from moec.sources.memory.ranges import PAGE, FileRange

LEAST = 1 << 20
"""Smaller tensors stay in memory, and of smaller arrays, whose memory may be given back, a copy."""


class Spool:
    """A file for tensors; reading one maps it, and `discard` gives the memory back."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir())
        self._end, self._lock = 0, threading.Lock()
        self._regions: weakref.WeakSet[FileRange] = weakref.WeakSet()

    @cached_property
    def file(self) -> int:
        """The descriptor of the file."""
        with tempfile.TemporaryFile(dir=self._folder, prefix="moec-") as file:
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def tensor(self, tensor: Tensor) -> Tensor:
        """The same values in the file. Raises UsageError where the disk is full."""
        if not tensor.nbytes or tensor.nbytes < LEAST or self._holds(tensor):
            return tensor
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        buffer = self._store(flat.numpy())
        return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)

    def array(self, array: Array) -> Array:
        """The same values in the file. Raises UsageError where the disk is full."""
        if not array.nbytes or array.nbytes < LEAST:
            return array.copy()
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        stored: Array = np.frombuffer(self._store(flat), np.uint8).view(array.dtype)
        return stored.reshape(array.shape)

    def _holds(self, tensor: Tensor) -> bool:
        start = tensor.untyped_storage().data_ptr()
        return tensor.is_contiguous() and any(start == part.address for part in self._regions)

    def discard(self) -> None:
        """Give back the memory of all tensors that were read; their values stay in the file."""
        for region in list(self._regions):
            region.discard()

    def check_room(self, size: int) -> None:
        """Raises UsageError where the disk has no room for `size` bytes more."""
        free = shutil.disk_usage(self._folder).free
        if free < size:
            raise SetupError(
                f"{self._folder}, for temporary files, has {show_bytes(free)} free, and weights of "
                f"{show_bytes(size)} are to be kept there: free some, set TMPDIR to a folder on "
                "another disk, or allow more memory (--memory)"
            )

    def write(self, content: Any) -> int:
        """Write the content, any buffer, and return where it starts. Raises UsageError."""
        view = memoryview(content).cast("B")
        with self._lock:
            start = at = self._end
            self._end += -(-view.nbytes // PAGE) * PAGE
        try:
            while view:
                count = os.pwrite(self.file, view[: 1 << 26], at)
                view, at = view[count:], at + count
        except OSError as error:
            raise SetupError(
                f"{self._folder}, for temporary files, cannot take {show_bytes(view.nbytes)} more "
                f"({error.strerror}): free some, or set TMPDIR to a folder on another disk"
            ) from error
        return start

    def _store(self, content: Array) -> Any:
        region = FileRange(self.file, self.write(content), content.nbytes)
        self._regions.add(region)
        return region.buffer()
