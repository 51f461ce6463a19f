"""The criterion for results: in 16 bits, or with rows of 8, eager's own error, else a limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch

from moec.ir.graph import Graph
from moec.oracle.rounding import (
    FLOAT32_NOISE,
    NOISE,
    UNIT,
    Excess,
    excess,
    of_distinct_rows,
    row_distances,
)
from moec.oracle.tolerance import (
    computed_dtypes,
    default_tolerance,
    distance,
    rounded_rows,
    row_errors,
)

SampleErrors: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Of a sample of rounding, f64[rows] by `row_errors` and f64[2, rows] by `row_distances`."""


@dataclass(frozen=True)
class Comparison:
    """A result and its references, each of which is right, eager's first. It is output number
    `output`, or, with `stop`, that output at token stop - 1. `exact` has the references in float32,
    eager's first, where the model computes in 16 bits, and `noisy` the errors of more samples of
    rounding."""

    actual: torch.Tensor
    right: tuple[torch.Tensor, ...]
    output: int
    stop: int | None = None
    exact: tuple[torch.Tensor, ...] = ()
    noisy: tuple[SampleErrors, ...] = ()

    def of(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        output = results[self.output]
        return output if self.stop is None else output[:, self.stop - 1]

    def with_reference(self, results: Sequence[torch.Tensor]) -> Comparison:
        """With results of eager as another reference."""
        return replace(self, right=(*self.right, self.of(results)))

    def with_choices(self, samples: Sequence[Sequence[torch.Tensor]]) -> Comparison:
        """With each integer as right that one of the samples has there."""
        expected = self.right[0]
        for results in samples:
            sample = self.of(results)
            if sample.shape == expected.shape == self.actual.shape:
                expected = torch.where(sample == self.actual, sample, expected)
        return replace(self, right=(*self.right, expected))

    def with_exact(self, results: Sequence[torch.Tensor]) -> Comparison:
        """With results of eager in float32 as another reference."""
        return replace(self, exact=(*self.exact, self._without_nan(results)))

    def sample(self, results: Sequence[torch.Tensor]) -> SampleErrors:
        """The errors of results of eager in float32 with noise, a sample of rounding."""
        result = self._without_nan(results)
        rounded = result.to(self.right[0].dtype)
        return row_errors(rounded, self.references[0]), row_distances(result, self.exact[0])

    def _without_nan(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        """A result in float32, with eager's values where it alone is NaN: a distance between NaN
        and a number would excuse any error."""
        exact, eager = self.of(results), self.right[0]
        if not exact.is_floating_point() or exact.shape != eager.shape:
            return exact
        return torch.where(exact.isnan() & ~eager.isnan(), eager.to(exact.dtype), exact)

    @cached_property
    def distance(self) -> float:
        """From eager, in float32 where the model computes in 16 bits."""
        return distance(self.actual, self.references[0])

    @property
    def references(self) -> tuple[torch.Tensor, ...]:
        return tuple(exact.to(self.right[0].dtype) for exact in self.exact) or self.right

    @cached_property
    def errors(self) -> torch.Tensor:
        """The error of each row against its nearest reference, [rows] in float64."""
        return torch.stack([row_errors(self.actual, value) for value in self.references]).amin(0)

    @cached_property
    def eager_errors(self) -> torch.Tensor:
        """Those of eager and of the noisy samples, [samples, rows] in float64."""
        first = row_errors(self.right[0], self.references[0])
        return torch.stack([first, *(errors for errors, _ in self.noisy)])

    def is_within(self, limit: float) -> bool:
        """Whether no row is further than `limit` from its nearest reference."""
        if self.is_integer:
            return any(torch.equal(self.actual, value) for value in self.references)
        if self.distance == float("inf"):
            return False
        return not len(self.errors) or bool(self.errors.max() <= limit)

    @property
    def is_integer(self) -> bool:
        return not self.right[0].is_floating_point()

    @property
    def fits(self) -> bool:
        """Whether shape and dtype are eager's."""
        expected = self.right[0]
        return self.actual.shape == expected.shape and self.actual.dtype == expected.dtype


@dataclass(frozen=True)
class Criterion:
    """No error may exceed `limit`. With `unit`, the spacing of 16-bit floats or the error of rows
    that are rounded to 8 bits, eager's own error is the yardstick instead, a sample of which is
    eager in float32 with relative `noise`."""

    limit: float
    unit: float = 0.0
    noise: float = 0.0

    @staticmethod
    def of(graph: Graph, tolerance: float | None) -> Criterion:
        """That of a graph. A `tolerance` of the user's is the limit of every row."""
        if tolerance is not None:
            return Criterion(tolerance)
        unit = max((UNIT.get(dtype, 0.0) for dtype in computed_dtypes(graph)), default=0.0)
        noise = unit * NOISE or FLOAT32_NOISE
        return Criterion(default_tolerance(graph), max(unit, rounded_rows(graph)), noise)

    def strays(self, compared: Iterable[Comparison]) -> tuple[int, int]:
        """(rows with an error above the limit against every reference, all rows)."""
        errors = [item.errors for item in compared]
        return sum(int((e > self.limit).sum()) for e in errors), sum(map(len, errors))

    def eager_strays(self, compared: Iterable[Comparison]) -> int:
        """The greatest number of such rows in a sample of eager's rounding."""
        counts = [(item.eager_errors > self.limit).sum(-1) for item in compared]
        return int(torch.stack(counts).sum(0).max()) if counts else 0

    def refusal(self, compared: Sequence[Comparison]) -> str | None:
        """Why the results are not right; "" where the error of an output says enough."""
        if not all(item.fits for item in compared):
            return ""
        if self.unit:
            return next((str(why) for why in self._excesses(compared)), None)
        return None if all(item.is_within(self.limit) for item in compared) else ""

    def _excesses(self, compared: Sequence[Comparison]) -> Iterator[Excess]:
        """Those of each output over all cases."""
        for group in _groups(compared):
            ours, eager = (
                torch.cat(parts, -1) for parts in zip(*map(_distances, group), strict=True)
            )
            for errors, reference in zip(ours, eager, strict=True):
                more = excess(errors, reference, self.unit)
                if more is not None:
                    yield more


def _groups(compared: Sequence[Comparison]) -> Iterable[list[Comparison]]:
    """The comparisons of each output. Pieces of a text are counted apart, because they have few
    rows compared with complete texts."""
    groups: dict[tuple[int, bool], list[Comparison]] = {}
    for item in compared:
        groups.setdefault((item.output, item.stop is not None), []).append(item)
    return groups.values()


def _distances(item: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
    """(f64[2, rows], f64[2, samples, rows]): the errors of the result and of samples of eager
    against eager in float32, where each row is another one."""
    ours = [row_distances(item.actual, exact) for exact in item.exact]
    first = row_distances(item.right[0], item.exact[0])
    eager = torch.stack([first, *(distances for _, distances in item.noisy)], 1)
    nearest = torch.stack(ours).amin(0)
    return of_distinct_rows(nearest, item.exact[0]), of_distinct_rows(eager, item.exact[0])
