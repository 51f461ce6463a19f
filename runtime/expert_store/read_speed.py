"""Measures how fast experts are read from an artifact's file, as the expert store reads them."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence

import numpy as np

from moec.runtime.artifact.open_file import OpenFile
from moec.runtime.expert_store.device import DIRECT, DIRECT_READERS
from moec.runtime.expert_store.slot_memory import allocate, opened_past_cache

MOST_SECONDS = 1.0
LEAST_PIECE, MOST_PIECE = 1 << 16, 1 << 24


def read_speed(file: OpenFile, reading: str, piece: int) -> float:
    """Bytes per second of reads of `piece` bytes (an expert's, within limits) all over the file.
    Through the page cache, the second reading of the same bytes counts."""
    piece = min(max(piece, LEAST_PIECE), MOST_PIECE) // mmap.PAGESIZE * mmap.PAGESIZE
    piece = min(piece, max(mmap.PAGESIZE, file.state.size // mmap.PAGESIZE * mmap.PAGESIZE))
    pieces = max(1, file.state.size // piece)
    # 7919 is a prime: neighbours in time are no neighbours in the file
    offsets = [number * 7919 % pieces * piece for number in range(4 * pieces)]
    past_cache = opened_past_cache(file) if reading == DIRECT else None
    if past_cache is not None:
        return _measure(past_cache, piece, offsets, DIRECT_READERS)[1]
    count, _ = _measure(file.descriptor, piece, offsets, 1)
    return _measure(file.descriptor, piece, offsets[:count], 1)[1]


def _measure(
    descriptor: int, piece: int, offsets: Sequence[int], readers: int
) -> tuple[int, float]:
    """How many of the pieces were read, and their bytes per second."""
    # memory as that of slots: into small shared pages the same reads take up to twice as long
    _, arrays = allocate([((piece,), np.dtype(np.uint8))] * readers)
    counts, sizes = [0] * readers, [0] * readers
    end = time.perf_counter() + MOST_SECONDS

    def read(reader: int) -> None:
        for offset in offsets[reader::readers]:
            sizes[reader] += os.preadv(descriptor, [arrays[reader].data], offset)
            counts[reader] += 1
            if time.perf_counter() > end:
                return

    threads = [threading.Thread(target=read, args=(n,)) for n in range(readers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts), sum(sizes) / (time.perf_counter() - start)
