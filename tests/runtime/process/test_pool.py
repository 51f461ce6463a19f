"""Loaded libraries share one thread pool, whose size changes no bit of a result."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

import moec
from moec.codegen.build import compile_kernels
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import linear
from moec.codegen.cpu.link import linked
from moec.codegen.specs.products import LinearSpec
from moec.errors import UsageError
from moec.runtime.device.library import open_kernels, tvm_ffi
from moec.runtime.device.tensors import aligned_copy
from moec.runtime.dtypes import Array
from moec.runtime.process import pool
from moec.target.cpu import host

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the pool is for Linux")

ROWS, WIDTH = 64, 512  # with so many rows the product is worth sharing


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    product = linear(host(), LinearSpec(WIDTH, WIDTH, "float32"))
    path = tmp_path_factory.mktemp("library") / "lib.so"
    path.write_bytes(linked(compile_kernels(product, target=host()), host()))
    return path


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the next library that is loaded from a path of its own start a pool."""

    def threads(count: int) -> None:
        monkeypatch.setattr(pool, "POOLS", {})
        monkeypatch.setenv("TVM_NUM_THREADS", str(count))

    return threads


def multiply(library: Path) -> Array:
    random = np.random.default_rng(0)
    shape = Layout(LinearSpec(WIDTH, WIDTH, "float32"), host()).shape
    x, packed = (random.standard_normal(s, np.float32) for s in ((ROWS, WIDTH), shape))
    y = np.zeros((ROWS, WIDTH), np.float32)
    arrays = [aligned_copy(a) for a in (x, packed, y)]
    open_kernels(library)["linear"](*map(tvm_ffi().from_dlpack, arrays))
    return arrays[-1]


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_the_number_of_threads_is_given_before_a_library_is_loaded(
    library: Path, fresh: Callable[[int], None], tmp_path: Path
) -> None:
    fresh(4)
    pool.set_pool_threads(3)
    before = count_threads()
    multiply(Path(shutil.copy(library, tmp_path / "3.so")))
    assert count_threads() == before + 2
    pool.set_pool_threads(3)
    with pytest.raises(UsageError, match="threads: 2, and the models of this process share a pool"):
        pool.set_pool_threads(2)


@pytest.mark.parametrize("threads", [0, True, "2", 1.5])
def test_threads_that_are_no_number_are_refused_before_the_file_is_read(threads: Any) -> None:
    with pytest.raises(UsageError, match="is not a positive number"):
        moec.load("absent.moec", threads=threads)


def test_any_number_of_threads_gives_the_same_bits(
    library: Path, fresh: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for count in (1, 2, 4):
        fresh(count)
        before = count_threads()
        results.append(multiply(Path(shutil.copy(library, tmp_path / f"{count}.so"))))
        assert count_threads() == before + count - 1
    monkeypatch.setattr(pool, "NAME", "that of no library")
    results.append(multiply(library))  # by TVM's pool
    assert np.any(results[0])
    assert all(np.array_equal(result, results[0]) for result in results)


def test_many_libraries_have_one_pool(
    library: Path, fresh: Callable[[int], None], tmp_path: Path
) -> None:
    fresh(3)
    multiply(Path(shutil.copy(library, tmp_path / "first.so")))
    gc.collect()
    before = count_threads(), count_mappings()
    for number in range(50):
        path = Path(shutil.copy(library, tmp_path / f"{number}.so"))
        multiply(path)
        path.unlink()
    gc.collect()
    assert count_threads() == before[0]
    assert count_mappings() - before[1] < 20


def count_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_a_task_that_refuses_says_why(fresh: Callable[[int], None]) -> None:
    with kernel("refusing") as frame:
        n = T.int64()
        x = argument("x", (n,), "float32")
        with T.parallel(0, n) as i, T.Assert(x[i] >= T.float32(0), "a negative number"):
            T.buffer_store(x, x[i] + T.float32(1), [i])
    fresh(2)
    refusing = compile_kernels(frame.function, target=host(), checked=True)["refusing"]
    x = aligned_copy(np.zeros(1000, np.float32))
    for last, words in ((0, ""), (-1, "a negative number")):
        x[-1] = last
        with pytest.raises(RuntimeError, match=words) if words else nullcontext():
            refusing(tvm_ffi().from_dlpack(x))


class Library:
    """A module without a pool, or one whose pool must not be requested."""

    def __init__(self, pool: bool) -> None:
        self.pool = pool

    def implements_function(self, name: str) -> bool:
        return self.pool

    def __getitem__(self, name: str) -> Any:
        raise AssertionError(name)


def test_tvms_pool_stays_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_BIND_THREADS", "0")
    pool.share_pool(Library(pool=False), Path("compiled_by_an_older_moec.so"))
    monkeypatch.setenv("TVM_BIND_THREADS", "1")
    pool.share_pool(Library(pool=True), Path("lib.so"))
