"""numba's compiler, typed: functions keep their types; machine code is cached on disk if a folder
for it can be written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    return cast(F, _njit(function, parallel=False))


def compiled_parallel(function: F) -> F:
    """Iterations of `numba.prange` run on all threads."""
    return cast(F, _njit(function, parallel=True))


def _njit(function: Callable[..., Any], *, parallel: bool) -> Any:
    try:
        return numba.njit(parallel=parallel, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return numba.njit(parallel=parallel)(function)
