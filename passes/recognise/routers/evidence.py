"""What is known about the routing of a region once it has been read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.ir.graph import Value
from moec.ir.sizes.dims import Dim


@dataclass(frozen=True)
class Evidence:
    """The routing of a region: values by their role, the number of experts, and rows before and
    after."""

    uses: Mapping[str, Sequence[Value]]
    experts: int
    rows_in: Dim
    rows_out: Dim
    output: Value
    reads: tuple[Value, ...]  # the tokens, and the initial value of the sum
    open: bool = False  # ids of `experts` and more are allowed and add nothing

    def values(self, *roles: str) -> list[Value]:
        return [v for role in roles for v in self.uses.get(role, ())]
