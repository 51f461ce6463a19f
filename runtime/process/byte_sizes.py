"""Sizes of memory as users name them."""

from __future__ import annotations

import re
from typing import Any

from moec.errors import UsageError

MOST_MEMORY = 1 << 60
"""Bytes."""
_UNITS = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def bytes_of(memory: Any, name: str = "memory") -> int:
    """The bytes that `memory`, the option `name`, names.

    Raises UsageError for anything but a positive number of bytes or a size such as "6GiB".
    """
    match = _SIZE.fullmatch(memory) if isinstance(memory, str) else None
    count = float(match[1]) * _UNITS[match[2]] if match else memory
    if (
        isinstance(count, bool)
        or not isinstance(count, int | float)
        or not 0 < count <= MOST_MEMORY
    ):
        raise UsageError(
            f'{name} is {memory!r}: give bytes, or a size with GiB, GB, MiB or MB, such as "6GiB"'
        )
    return int(count)
