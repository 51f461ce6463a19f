"""Python's garbage collection is changed while a model is compiled, and restored afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

import moec
from moec.errors import CaptureError
from moec.runtime.process.gc_pause import gc_paused


@pytest.fixture(autouse=True)
def as_it_was():
    """Tests set objects aside themselves (conftest.py)."""
    before, enabled, thresholds = gc.get_freeze_count(), gc.isenabled(), gc.get_threshold()
    gc.unfreeze()
    gc.enable()
    gc.set_threshold(700, 10, 9)
    yield
    gc.set_threshold(*thresholds)
    (gc.enable if enabled else gc.disable)()
    if before:
        gc.freeze()


def test_objects_are_set_aside_and_come_back() -> None:
    def export() -> None:
        with gc_paused():
            assert gc.get_freeze_count() > 1000
            assert gc.get_threshold() == (20_000, 10, 9)
            raise KeyError

    with pytest.raises(KeyError):
        export()
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == (700, 10, 9)


def test_rarer_collections_stay_as_rare() -> None:
    gc.set_threshold(50_000, 10, 10)
    with gc_paused():
        assert gc.get_threshold() == (50_000, 10, 10)


def test_what_the_program_set_aside_stays_there() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with gc_paused():
        assert gc.get_threshold() == (700, 10, 9)
    assert gc.get_freeze_count() >= count * 0.99  # a few were deleted
    gc.unfreeze()


def test_where_nothing_is_collected_nothing_is_changed() -> None:
    gc.disable()
    with gc_paused():
        assert gc.get_freeze_count() == 0
        assert not gc.isenabled()


def test_it_is_so_until_a_model_is_compiled() -> None:
    set_aside: dict[str, int] = {}

    def progress(phase: str) -> None:
        set_aside[phase] = gc.get_freeze_count()

    with pytest.raises(CaptureError):
        moec.compile(torch.nn.Linear(2, 2), (torch.zeros(2, 3),), progress=progress)
    assert set_aside["capture"] > 1000
    moec.compile(torch.nn.Linear(2, 2), (torch.zeros(3, 2),), progress=progress)
    assert set_aside["kernels"] > 1000
    assert gc.get_freeze_count() == 0


def test_moec_compile_is_imported_without_a_collection_and_without_what_few_models_need() -> None:
    program = (
        "import gc, sys\n"
        "collections = []\n"
        "gc.callbacks.append(lambda phase, about: collections.append(about['generation']))\n"
        "import moec\n"
        "before = len(collections)\n"
        "moec.compile\n"
        "print(len(collections) - before, gc.get_threshold()[0], gc.get_freeze_count())\n"
        "print(sorted({'networkx', 'numba', 'onnx', 'scipy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["0 700 0", "[]"]


def test_a_name_that_is_imported_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collections are deferred for an import alone: in a process with 400,000 frozen objects, each
    `moec.compile` took 40 ms."""
    compile = moec.compile
    monkeypatch.setattr(moec, "gc_deferred", lambda: pytest.fail("nothing is imported"))
    assert moec.compile is compile
