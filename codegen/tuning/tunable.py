"""A kernel that can be tuned: its name, its values, and its generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from tvm.tirx import PrimFunc

Values: TypeAlias = Mapping[str, int]
"""The tuning values of a kernel by name; missing ones have their defaults."""

Tunings: TypeAlias = Mapping[str, Values]
"""The tuning values of kernels, by the key of the kernel."""

Make: TypeAlias = Callable[[str, Values], PrimFunc]


@dataclass(frozen=True)
class KernelWork:
    """The work of a call: `top_k` rows per token, over `experts` experts. The kernel compares it
    with the tuning value `worth`."""

    top_k: int
    experts: int
    sums: int
    bytes: int

    def of(self, tokens: int) -> int:
        """The work of a loop over all rows, in the unit of `worth`: multiply-adds and bytes."""
        rows = tokens * self.top_k
        return rows * self.sums + min(rows, self.experts) * self.bytes


@dataclass(frozen=True)
class Tunable:
    """`make(name, values)` generates the kernel. `candidates` lists the candidates of each value,
    the default first; a value without candidates is not tuned.

    `key` identifies everything that the kernel is generated from except the target and its values.
    Values change no bit of its results and no packed weights.
    """

    name: str
    key: str
    work: KernelWork
    make: Make
    candidates: Mapping[str, tuple[int, ...]]

    def changed(self, values: Values) -> dict[str, int]:
        """The values that differ from the default."""
        return {name: n for name, n in values.items() if n != self.candidates[name][0]}

    def complete(self, values: Values) -> dict[str, int]:
        """All values of the kernel, defaults included."""
        return {name: values.get(name, options[0]) for name, options in self.candidates.items()}
