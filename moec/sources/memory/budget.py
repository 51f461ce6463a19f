"""The memory that a compilation may take, and the parts that it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moec.errors import SetupError
from moec.runtime.checks import free_memory, show_bytes
from moec.runtime.process.byte_sizes import bytes_of
from moec.runtime.process.memory_limit import resident_bytes

COMPILER = 448 << 20
"""Bytes of what a compilation loads and builds after it has found its checkpoint: TVM and LLVM with
a kernel for each processor, the classes of transformers, graphs, and mapped weights beyond a limit
until they are given back."""
MOST_RESULTS = 1 << 25
"""The numbers of results that verification holds at once: of the code, of eager and in float32."""
_RESULT_BYTES = 8
_MOST_ROWS = 1 << 12
"""Those that one verification compares."""
_COPIES = 3
"""Weights as they are loaded, as passes change them, and packed for kernels."""


def allowed_bytes(memory: Any) -> int:
    """The bytes that `memory` names; for None, half of the free memory and what the process has.
    Raises UsageError as `bytes_of` does."""
    return resident_bytes() + free_memory() // 2 if memory is None else bytes_of(memory)


class TooLittleMemory(SetupError):
    """A compilation needs more memory than it may take."""


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes: the `limit` of a process with its children, what the `process` has before it reads
    weights, what its `compiler` takes, the `operator` with the largest weight (as it is read, in
    float32 and packed), and the `results` that verification compares."""

    limit: int
    process: int
    compiler: int
    operator: int
    results: int

    @property
    def needed(self) -> int:
        return self.process + self.compiler + self.operator + self.results

    @property
    def left(self) -> int:
        """The bytes for weights that wait for their operators."""
        return self.limit - self.needed

    def holds(self, weights: int) -> bool:
        """Whether a compilation fits with weights of so many bytes in memory."""
        return _COPIES * weights <= self.left

    def over(self) -> int:
        """The bytes that the process and its children take beyond the limit, now."""
        return resident_bytes() - self.limit

    def check(self) -> None:
        """Raises TooLittleMemory where the limit cannot be kept."""
        if self.left < 0:
            raise self.exceeded(self.needed)

    def exceeded(self, size: int) -> TooLittleMemory:
        """The error of a compilation that needs or takes `size` bytes."""
        return TooLittleMemory(
            f"this compilation may take {show_bytes(self.limit)} of memory, and needs "
            f"{show_bytes(max(size, self.needed))}: {show_bytes(self.process)} of the process, "
            f"{show_bytes(self.compiler)} for the compiler and its graphs, "
            f"{show_bytes(self.operator)} for the largest weight and {show_bytes(self.results)} "
            "for the results that are verified: allow more (--memory)"
        )


def budget_of(limit: int, weights: Sequence[tuple[Sequence[int], int]]) -> MemoryBudget:
    """The parts for weights of these shapes and bytes a number, in a process as it is now."""
    largest = max((math.prod(shape) * (6 + size) for shape, size in weights), default=0)
    widest = max((shape[0] for shape, _ in weights if len(shape) == 2), default=0)
    results = _RESULT_BYTES * min(MOST_RESULTS, _MOST_ROWS * widest)
    return MemoryBudget(limit, resident_bytes(), COMPILER, largest, results)
