"""The thread pool of pool.c alone. Tasks are Python functions, so tests control their timing."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi

from moec.codegen.cpu.link import POOL, linker_for
from moec.runtime.process.pool import connected
from moec.target.cpu import host

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the pool is for Linux")

TASK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
Task = Callable[[int], int | None]
WAIT = 20  # seconds, in which a test that hangs fails

ADD = """
int add(int task, void *group, unsigned *counts) {
  (void)group;
  __atomic_fetch_add(&counts[task], 1, __ATOMIC_RELAXED);
  return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "pool.so"
    path.with_name("add.c").write_text(ADD)
    words = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared"]
    subprocess.run(
        [*linker_for(host()), *words, str(POOL), "add.c", "-o", str(path)],
        cwd=path.parent,
        check=True,
    )
    return path


Launch = Callable[..., int]


@pytest.fixture
def pool(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Launch]:
    """Threads -> the launch of another pool: a copy of the library has variables of its own."""

    def start(threads: int) -> Launch:
        monkeypatch.setenv("TVM_NUM_THREADS", str(threads))
        monkeypatch.setenv("TVM_THREAD_POOL_SPIN_COUNT", "100")
        opened = connected(ctypes.CDLL(shutil.copy(library, tmp_path / f"{threads}.so")))
        return launch_of(opened)

    return start


def launch_of(opened: Any) -> Launch:
    def launch(task: Task, tasks: int = 0) -> int:
        code: int = opened.moec_pool_launch(TASK(lambda i, group, data: task(i) or 0), None, tasks)
        return code

    return launch


def thread_of(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_each_task_runs_once_and_threads_share_them(pool: Callable[[int], Launch]) -> None:
    launch, meet, counts = pool(3), threading.Barrier(3, timeout=WAIT), [0] * 300
    assert launch(lambda i: counts.__setitem__(i, counts[i] + 1), len(counts)) == 0
    assert counts == [1] * len(counts)
    assert launch(lambda i: meet.wait() * 0, 3) == 0  # three threads at a time


def test_one_thread_runs_all_by_itself(pool: Callable[[int], Launch]) -> None:
    launch, threads = pool(1), []
    assert launch(lambda i: threads.append(threading.get_ident()), 5) == 0
    assert launch(lambda i: threads.append(threading.get_ident())) == 0  # in one part
    assert threads == [threading.get_ident()] * 6


def test_no_loop_waits_for_a_worker_that_does_not_come(pool: Callable[[int], Launch]) -> None:
    launch = pool(2)
    started, go_on = threading.Semaphore(0), threading.Event()

    def held(task: int) -> None:
        started.release()
        go_on.wait(WAIT)

    caller = thread_of(lambda: launch(held, 2))
    assert all(started.acquire(timeout=WAIT) for _ in range(2))  # the only worker is held now
    threads: list[int] = []
    for _ in range(3):
        assert launch(lambda i: threads.append(threading.get_ident()), 50) == 0
    assert threads == [threading.get_ident()] * 150
    assert caller.is_alive()  # it waits, since the worker has claimed its task
    go_on.set()
    caller.join(WAIT)
    assert not caller.is_alive()


def test_a_task_that_is_claimed_is_waited_for(pool: Callable[[int], Launch]) -> None:
    launch, finished = pool(2), []
    claimed, main = threading.Event(), threading.get_ident()

    def late(task: int) -> None:
        if threading.get_ident() == main:
            claimed.wait(WAIT)
            return
        claimed.set()
        threading.Event().wait(0.1)  # longer than the caller looks before it sleeps
        finished.append(task)

    assert launch(late, 2) == 0
    assert len(finished) == 1


def test_many_callers_at_once(pool: Callable[[int], Launch]) -> None:
    """More than the pool has slots."""
    launch, sums = pool(3), [0] * 24
    add = threading.Lock()

    def call(caller: int) -> None:
        def task(i: int) -> None:
            with add:
                sums[caller] += i

        for _ in range(20):
            assert launch(task, 10) == 0

    callers = [thread_of(lambda c=c: call(c)) for c in range(len(sums))]
    for caller in callers:
        caller.join(WAIT)
    assert sums == [20 * 45] * len(sums)


def test_a_launch_inside_a_task_stays_in_its_thread(pool: Callable[[int], Launch]) -> None:
    launch, alone = pool(2), []

    def outer(task: int) -> int:
        both = threading.Barrier(2)

        def inner(i: int) -> None:
            try:
                both.wait(0.2)
            except threading.BrokenBarrierError:
                alone.append(i)

        return launch(inner, 2)

    assert launch(outer, 1) == 0
    assert alone == [0, 1]


def test_no_task_is_lost_or_run_twice(pool: Callable[[int], Launch], tmp_path: Path) -> None:
    """Tasks of a few cycles, which Python's would not let run at the same time."""
    pool(4)
    jobs = 3000
    opened = ctypes.CDLL(str(tmp_path / "4.so"))
    counts = (ctypes.c_uint32 * 10_000)()
    for _ in range(jobs):
        assert opened.moec_pool_launch(opened.add, counts, len(counts)) == 0
    assert list(counts) == [jobs] * len(counts)


@pytest.mark.parametrize("text", ["no memory for task 1", ""])
def test_an_error_of_a_worker_is_the_callers(pool: Callable[[int], Launch], text: str) -> None:
    launch, main, claimed = pool(2), threading.get_ident(), threading.Event()
    ffi = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())

    def task(i: int) -> int:
        if threading.get_ident() == main:
            claimed.wait(WAIT)
            return 0
        claimed.set()
        if text:
            ffi.TVMFFIErrorSetRaisedFromCStr(b"ValueError", text.encode())
        return 1

    assert launch(task, 2) == -1
    error = ctypes.POINTER(Error)()
    ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(error))
    message = ctypes.string_at(error.contents.message, error.contents.message_size).decode()
    assert message == (text or "a task of a parallel loop failed")
    assert launch(lambda i: 0, 2) == 0  # the next job is free of it


class Error(ctypes.Structure):
    """The start of tvm_ffi's error objects (ffi/c_api.h: TVMFFIObject, TVMFFIErrorCell)."""

    _fields_ = [
        ("header", ctypes.c_uint64 * 3),
        ("kind", ctypes.c_void_p),
        ("kind_size", ctypes.c_size_t),
        ("message", ctypes.c_void_p),
        ("message_size", ctypes.c_size_t),
    ]


FORKS = """
import ctypes, os, signal, sys, threading
from moec.runtime.device.library import tvm_ffi
from moec.runtime.process.pool import connected
tvm_ffi()
opened = connected(ctypes.CDLL(sys.argv[1]))
os.register_at_fork(after_in_child=opened.moec_pool_forked)
TASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

def meet():
    both = threading.Barrier(2, timeout=20)  # a thread alone fails here
    return opened.moec_pool_launch(TASK(lambda *_: both.wait() * 0), None, 2)

assert meet() == 0
for turn in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(meet() or meet())
    assert os.waitpid(child, 0)[1] == 0
assert meet() == 0
"""


def test_a_child_has_workers_of_its_own(library: Path) -> None:
    environment = os.environ | {"TVM_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(library)]
    subprocess.run(command, check=True, timeout=100, env=environment)


@pytest.mark.parametrize(
    ("threads", "flags", "rounds", "forks"),
    [(2, "-O2", 500, 20), (8, "-O2", 500, 20), (8, "-fsanitize=thread", 60, 0)],
)
def test_hostile_callers(tmp_path: Path, threads: int, flags: str, rounds: int, forks: int) -> None:
    """20 threads that launch, nest and fail at once, with children forked in between; and the
    result of the thread sanitizer (which cannot check a child that starts threads)."""
    program, source = tmp_path / "driver", Path(__file__).parent / "pool_driver.c"
    words = ["-std=gnu11", "-g", flags, f"-I{POOL.parent}", str(source), "-lpthread"]
    done = subprocess.run([*linker_for(host()), *words, "-o", program], capture_output=True)
    if done.returncode and b"tsan" in done.stderr:
        pytest.skip("the thread sanitizer is not installed")
    assert done.returncode == 0, done.stderr.decode()
    environment = {"TVM_NUM_THREADS": str(threads), "TVM_THREAD_POOL_SPIN_COUNT": "20"}
    done = subprocess.run(
        [program, str(rounds), str(forks)], capture_output=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr.decode()
