"""A kernel whose values can be tuned: what it is called, which values it has, how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from tvm.tirx import PrimFunc

Values: TypeAlias = Mapping[str, int]
"""What a kernel is to choose, by name; what is not there has its default."""

Tunings: TypeAlias = Mapping[str, Values]
"""Values by the key of the kernel."""

Make: TypeAlias = Callable[[str, Values], PrimFunc]


@dataclass(frozen=True)
class KernelWork:
    """What a call does, for the measurement: of each token the kernel sees `top_k` rows, of
    `experts` experts. It compares `work(tokens)` with the value called `worth`."""

    top_k: int
    experts: int
    sums: int
    bytes: int

    def of(self, tokens: int) -> int:
        """Multiplications and bytes that a loop over all rows has, as `worth` counts them."""
        rows = tokens * self.top_k
        return rows * self.sums + min(rows, self.experts) * self.bytes


@dataclass(frozen=True)
class Tunable:
    """`make(name, values)` gives the kernel. `candidates` are what each of its values is measured
    with, the default first; none where only the default is known to be right.

    `key` stands for all that it is generated from but the target and its values. Other values
    change no bit of its results, and nothing about packed weights.
    """

    name: str
    key: str
    work: KernelWork
    make: Make
    candidates: Mapping[str, tuple[int, ...]]

    def changed(self, values: Values) -> dict[str, int]:
        """Those of the values that are not the default."""
        return {name: n for name, n in values.items() if n != self.candidates[name][0]}

    def complete(self, values: Values) -> dict[str, int]:
        """All values of the kernel, defaults included."""
        return {name: values.get(name, options[0]) for name, options in self.candidates.items()}
