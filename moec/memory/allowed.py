"""The memory that a compilation may take, as the user names it."""

from __future__ import annotations

from typing import Any

from moec.runtime.checks import free_memory
from moec.runtime.process.byte_sizes import bytes_of


def allowed_bytes(memory: Any) -> int:
    """The bytes that `memory` names; half of the free memory for None. Raises UsageError as
    `bytes_of` does."""
    return free_memory() // 2 if memory is None else bytes_of(memory)
