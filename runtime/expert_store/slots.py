"""How many experts of each layer are in memory, for a limit of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moec.errors import SetupError
from moec.runtime.checks import show_bytes

WORKING_SHARE = 16
"""One part in so many of the limit is for intermediate values, ..."""
LEAST_WORKING = 96 << 20
"""... and so many bytes at least."""


@dataclass(frozen=True)
class LayerSize:
    """The number of experts of a layer, and the bytes of one of them in all of its stacks."""

    experts: int
    expert_bytes: int


@dataclass(frozen=True)
class MemoryLimit:
    """A limit of memory in bytes. `experts` are the bytes that are left for experts: without what
    the process takes before it loads weights, the weights that are always in memory, the `caches`
    of texts, and a part for intermediate values."""

    bytes: int
    process: int
    resident: int
    caches: int = 0

    @property
    def working(self) -> int:
        return max(LEAST_WORKING, self.bytes // WORKING_SHARE)

    @property
    def experts(self) -> int:
        return self.bytes - self.process - self.resident - self.caches - self.working


def slots_within(limit: MemoryLimit, layers: Sequence[LayerSize]) -> list[int]:
    """The slots of each layer, of `limit.experts` bytes in all: the same share of each layer's
    experts, and one at least. What is left over goes to the first layers.

    Raises UsageError where not even one expert a layer fits.
    """
    least = sum(layer.expert_bytes for layer in layers)
    if limit.experts < least:
        needed = limit.bytes - limit.experts + least
        raise SetupError(
            f"memory is {show_bytes(limit.bytes)}, and this model needs {show_bytes(needed)}: "
            f"{show_bytes(limit.resident)} of weights that are always in memory, "
            f"{show_bytes(least)} for one expert of each layer, {show_bytes(limit.process)} of "
            f"the process and {show_bytes(limit.working + limit.caches)} for texts"
        )
    total = sum(layer.experts * layer.expert_bytes for layer in layers)
    share = min(1.0, limit.experts / total)
    slots = [max(1, math.floor(layer.experts * share)) for layer in layers]
    left = limit.experts - sum(n * x.expert_bytes for n, x in zip(slots, layers, strict=True))
    while left < 0:  # the layers with one slot have more than their share
        most = max(range(len(slots)), key=slots.__getitem__)
        slots[most] -= 1
        left += layers[most].expert_bytes
    for number, layer in enumerate(layers):
        if slots[number] < layer.experts and layer.expert_bytes <= left:
            slots[number] += 1
            left -= layer.expert_bytes
    return slots
