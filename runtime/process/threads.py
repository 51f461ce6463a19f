"""The number of threads of kernels, and how they wait for each other.

The pool (pool.py) reads these settings once, when the process first runs a parallel kernel; TVM's
pool reads them for each thread of the program. So call `set_threads` before the first run. It does
not import TVM. In the pool, TVM_THREAD_POOL_SPIN_COUNT is the number of times that a worker polls
for the next loop before it sleeps: the first half takes about 25 ns each, the second half yields
the core to other processes between polls.

Measured with TVM's pool on two cores, a product of 2048 x 2048 float32 alone and in turn with
torch.mm (four rounds, medians, with other processes busy):

    count     TVM takes half of the processors it sees; all of them double the speed
    waiting   workers that never spin cost 0.03 ms a kernel (0.12 against 0.09 ms at one row);
              from 200 to 300,000 spins there is no difference beyond the noise, but the last,
              TVM's own choice, burns a core for a tenth of a second after every kernel
    binding   workers tied to cores took 1.2 to 1.6 times as long where torch or another process
              used the cores too, and were no faster alone
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping

from moec.errors import UsageError
from moec.runtime.process.memory_limit import cpu_quota

SPINS = 2000


def set_threads(
    count: int | None = None, environment: MutableMapping[str, str] = os.environ
) -> int:
    """Let kernels use `count` threads (by default: every processor this process may use).

    TVM_NUM_THREADS, TVM_THREAD_POOL_SPIN_COUNT and TVM_BIND_THREADS keep the user's values, unless
    `count` is given; an empty variable counts as unset. Returns the number of threads.

    Raises UsageError where `count` or one of the variables is not an allowed number.
    """
    if count is not None:
        check_threads(count)
    defaults = {
        "TVM_NUM_THREADS": (1, str(available())),
        "TVM_THREAD_POOL_SPIN_COUNT": (0, str(SPINS)),
        "TVM_BIND_THREADS": (0, "0"),
    }
    if count is not None:
        environment["TVM_NUM_THREADS"] = str(count)
    for variable, (least, default) in defaults.items():
        value = environment.get(variable, "").strip()
        if value and not (value.isdecimal() and least <= int(value) < 1 << 31):
            raise UsageError(
                f"the environment variable {variable} is {value!r}: give a whole number from "
                f"{least}, or unset it"
            )
        environment[variable] = value or default
    return int(environment["TVM_NUM_THREADS"])


def check_threads(count: object) -> None:
    if type(count) is not int or count < 1:
        raise UsageError(f"threads: {count!r} is not a positive number")


def shorten_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the threads of GNU's OpenMP, which PyTorch uses on Linux, sleep after a tenth of a
    millisecond of waiting, unless the user has set how they wait. The library reads this when it is
    loaded, so call it before torch is imported.

    By default a thread polls 150 times as long, even if the thread that it waits for has no core:
    on two cores 2.6 GB of experts took 20 s to load in place of 6 s. With ten times these spins a
    model of .1 GB compiles in 22.5 s instead of 23.4 on idle cores, but in 72 s instead of 45
    beside two busy processes.
    """
    if not any(environment.get(name, "").strip() for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def available() -> int:
    """The number of processors that this process may use, by affinity and by quota. The quota is
    rounded up, since with a quota of 1.5 two threads are faster than one."""
    return min(affine(), math.ceil(min(cpu_quota(), 1 << 16)))


def affine() -> int:
    """The number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
