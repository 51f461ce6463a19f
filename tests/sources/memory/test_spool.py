"""Tensors in a temporary file keep their values, whatever is discarded from memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

from moec.errors import UsageError
from moec.sources.memory import spool as spools
from moec.sources.memory.spool import Spool


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(spools, "LEAST", 0)


def test_values_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool, generator = Spool(), torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, 5000, generator=generator),
        torch.randn(4, 9, generator=generator).bfloat16().t(),
        torch.arange(7000, dtype=torch.uint8),
        torch.zeros(0, 4),
    ]
    copies = [spool.tensor(tensor) for tensor in tensors]
    spool.discard()
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.dtype == copy.dtype
    array = np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16)
    assert np.array_equal(spool.array(array), array)
    assert list(tmp_path.iterdir()) == []  # the file has no name: nothing is left behind


def test_what_is_written_stays_too():
    spool = Spool()
    copy = spool.tensor(torch.zeros(5000))
    copy[7] = 3
    spool.discard()
    assert copy[7] == 3


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def pwrite(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(UsageError) as raised:
        Spool().tensor(torch.zeros(1 << 20))
    assert str(raised.value) == (
        f"{tmp_path}, for temporary files, cannot take 4.2 MB more (No space left on device): free "
        "some, or set TMPDIR to a folder on another disk"
    )


def test_room_is_checked_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    spool = Spool()
    spool.check_room(4_000_000)
    with pytest.raises(UsageError) as raised:
        spool.check_room(6_000_000)
    assert str(raised.value) == (
        f"{tmp_path}, for temporary files, has 5.0 MB free, and weights of 6.0 MB are to be kept "
        "there: free some, set TMPDIR to a folder on another disk, or allow more memory (--memory)"
    )


def test_discarding_gives_memory_back():
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[2])

    spool = Spool()
    copy = spool.tensor(torch.ones(1 << 24))
    copy.sum()
    before = mapped()
    spool.discard()
    assert before - mapped() > 15_000  # pages: the tensor has 16,384
    assert copy.sum() == 1 << 24
