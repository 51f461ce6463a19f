"""What reading a region showed of its routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.ir.dims import Dim
from moec.ir.graph import Value


@dataclass(frozen=True)
class Evidence:
    """What a region showed: values by role, its tokens and its result's."""

    uses: Mapping[str, Sequence[Value]]
    experts: int
    rows_in: Dim
    rows_out: Dim
    output: Value
    reads: tuple[Value, ...]  # the tokens, and what the sum starts from
    open: bool = False  # ids beyond the experts are allowed and add nothing

    def values(self, *roles: str) -> list[Value]:
        return [v for role in roles for v in self.uses.get(role, ())]
