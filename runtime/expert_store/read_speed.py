"""Measures how fast experts are read from an artifact's file, as the expert store reads them."""

from __future__ import annotations

import mmap
import os
import threading
import time

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
    past_cache = opened_past_cache(file) if reading == DIRECT else None
    if past_cache is not None:
        return _measure(past_cache, piece, pieces, DIRECT_READERS)
    _measure(file.descriptor, piece, pieces, 1)
    return _measure(file.descriptor, piece, pieces, 1)


def _measure(descriptor: int, piece: int, pieces: int, readers: int) -> float:
    counts = [0] * readers
    end = time.perf_counter() + MOST_SECONDS

    # as slots are: into pages of another kind the same reads take up to twice as long
    _, arrays = allocate([((piece,), np.dtype(np.uint8))] * readers)

    def read(reader: int) -> None:
        for number in range(reader, 4 * pieces, readers):
            # 7919 is a prime: neighbours in time are no neighbours in the file
            os.preadv(descriptor, [arrays[reader]], number * 7919 % pieces * piece)
            counts[reader] += piece
            if time.perf_counter() > end:
                return

    threads = [threading.Thread(target=read, args=(n,)) for n in range(readers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)
