"""The tuning values of product kernels.

A value changes when data are read, or which thread computes something, but never the order of a
sum: kernels with other values give the same bits and read the same packed weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

MOST = 1 << 30


def _value(default: int, *others: int) -> int:
    value: int = field(default=default, metadata={"candidates": (default, *others)})
    return value


@dataclass(frozen=True)
class Tuning:
    """The values that a kernel is generated from.

    fetched        bytes by which few rows prefetch their weights ahead; 0: they prefetch the next
                   tile instead
    tiles_at_once  the most tiles of columns of an expert that a thread computes at once
    dots_below     with fewer rows of an expert, dot products are used instead of AMX
    worth          the least work of a loop that is shared among threads (parallel.py)
    """

    fetched: int = _value(16384, 0, 4096)
    tiles_at_once: int = _value(4, 1, 8)
    dots_below: int = _value(24, 8, 16, 32)
    worth: int = _value(2**21, 2**20, 2**22)


DEFAULT = Tuning()


def candidates(name: str) -> tuple[int, ...]:
    """The candidates that tuning measures for the value `name`, its default first."""
    (entry,) = (f for f in fields(Tuning) if f.name == name)
    return tuple(entry.metadata["candidates"])


def tuning_of(values: Mapping[str, int]) -> Tuning:
    """The tuning with these values, defaults elsewhere.

    Raises ValueError for a name or a value that no kernel can be made with.
    """
    for name, value in values.items():
        if name not in Tuning.__dataclass_fields__:
            raise ValueError(f"there is no value {name!r} to tune")
        if type(value) is not int or not (name == "tiles_at_once") <= value <= MOST:
            raise ValueError(f"{name} is {value!r}, and no kernel is made so")
    return Tuning(**values)
