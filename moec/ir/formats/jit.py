"""numba's compiler, typed: functions keep their types; machine code is cached on disk if a folder
for it can be written to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    return cast(F, _njit(function, parallel=False))


def compiled_parallel(function: F) -> F:
    """Iterations of `numba.prange` run on as many threads as torch's: OpenMP's own limit, which
    numba does not read, would let more of them wait for each other."""
    loop, threads = _njit(function, parallel=True), threads_of_torch()

    @wraps(function)
    def run(*args: Any) -> Any:
        numba.set_num_threads(threads)
        return loop(*args)

    return cast(F, run)


@cache
def threads_of_torch() -> int:
    """Read before a loop runs: numba then sets OpenMP's number, which torch reads."""
    import torch  # `moec plan` compiles loops without it

    return min(int(numba.config.NUMBA_NUM_THREADS), torch.get_num_threads())


def _njit(function: Callable[..., Any], *, parallel: bool) -> Any:
    try:
        return numba.njit(parallel=parallel, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return numba.njit(parallel=parallel)(function)
