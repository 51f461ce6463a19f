"""The criterion for results: the error of each row, and how many rows may exceed the limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from moec.interpret.tolerance import (
    FAR,
    QUANTISED_STRAYS,
    STRAYS,
    allowed_strays,
    computed_dtypes,
    default_tolerance,
    distance,
    rounds_rows,
    row_errors,
)
from moec.ir.graph import Graph


@dataclass(frozen=True)
class Comparison:
    """A result and its references, each of which is right, eager's first. It is output number
    `output`, or, with `stop`, that output at token stop - 1."""

    actual: torch.Tensor
    right: tuple[torch.Tensor, ...]
    output: int
    stop: int | None = None

    def of(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        output = results[self.output]
        return output if self.stop is None else output[:, self.stop - 1]

    @cached_property
    def distance(self) -> float:
        """From eager."""
        return distance(self.actual, self.right[0])

    @cached_property
    def errors(self) -> torch.Tensor:
        """The error of each row against its nearest reference, [rows] in float64."""
        return torch.stack([row_errors(self.actual, value) for value in self.right]).amin(0)


@dataclass(frozen=True)
class Criterion:
    """No error may exceed `greatest`, and at most a `share` of the rows may exceed `limit`."""

    limit: float
    greatest: float
    share: float

    @staticmethod
    def of(graph: Graph, tolerance: float | None) -> Criterion:
        limit = default_tolerance(graph) if tolerance is None else tolerance
        share = max((STRAYS.get(dtype, 0.0) for dtype in computed_dtypes(graph)), default=0.0)
        share = max(share, QUANTISED_STRAYS if rounds_rows(graph) else 0.0)
        return Criterion(limit, max(limit, FAR) if share else limit, share)

    def strays(self, compared: Iterable[Comparison]) -> tuple[int, int]:
        """(rows with an error above the limit against every reference, all rows)."""
        errors = [item.errors for item in compared]
        return sum(int((e > self.limit).sum()) for e in errors), sum(map(len, errors))

    def allows(self, compared: Sequence[Comparison]) -> bool:
        for item in compared:
            if item.distance == float("inf"):
                return False
            if len(item.errors) and not item.errors.max() <= self.greatest:
                return False
        if not self.share:
            return True
        # Counted apart, because pieces of a text have few rows compared with complete texts.
        groups: dict[tuple[int, bool], list[Comparison]] = {}
        for item in compared:
            groups.setdefault((item.output, item.stop is not None), []).append(item)
        counts = map(self.strays, groups.values())
        return all(strays <= allowed_strays(self.share, rows) for strays, rows in counts)
