"""Whether an error is the rounding of 16 bits, or of rows to 8: eager's own is the yardstick.

The reference is eager in float32. The errors of all rows of the code and of eager in 16 bits are
two samples; the code's may be at most `FACTOR` times as large: at each share of the rows, and in
the mean of the rows without the worst. A row with nearly tied router scores may go to other experts
in either, so that single rows of the code may be far off, as many as are in eager, up to chance.
What follows such a token in its text is off with it: where one sample of eager does not excuse the
code, eager in float32 with the noise of rounding, by the first of `NOISE_SEEDS`, gives more of
them, and where these do not, by the next: one token that goes to another expert moves all that
follow it, so that few samples may not have met it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

FACTOR = 1.25
UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}
"""The spacing of floats at 1. A smaller error of a row's greatest is the result's rounding."""
FLOAT32_UNIT = 2e-5
"""An error of a row in float32 by less is the rounding of reordered sums over dozens of layers."""
FLOAT64_UNIT = 1e-12
"""As that, in float64."""
NOISE_SEEDS = tuple(range(start, start + 8) for start in range(0, 32, 8))
NOISE = 12**-0.5
"""The standard deviation of a rounding, in spacings of floats."""
FLOAT32_NOISE = 2.0**-22
"""That of sums of some hundred terms in float32, relative to the result: enough for a row between
two codes of 8 bits, or between two experts, to take the other."""
_TOGETHER = 1 << 20
"""Numbers whose errors are computed at once: logits in float64 take much memory."""
_SHARES = 16
_CHANCE = 3.0
"""Standard deviations of a count that are chance."""
_RARE = 0.02
"""The share of rows that is taken to be nearly tied where eager shows none."""
_TRIMMED = (0.5, 0.8, 0.95)


def row_distances(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """f64[2, rows]: for each row (all axes but the last) the greatest and the root mean square of
    its differences, both relative to the row's own in `exact`; inf where NaNs or infinities differ;
    0 or 1 for integers."""
    pairs = zip(parts_of(actual), parts_of(exact), strict=True)
    return torch.cat([_distances(a, b) for a, b in pairs], 1)


def parts_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows [rows, last axis] of a tensor in parts, each of few numbers."""
    width = tensor.shape[-1] if tensor.ndim else 1
    return torch.split(tensor.reshape(-1, width), max(1, _TOGETHER // max(1, width)))


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not b.is_floating_point():
        return (a != b).any(-1).double().expand(2, -1)
    a, b = a.double(), b.double()
    finite = b.isfinite()
    odd = ((a.isfinite() != finite) | (~finite & ~_same_values(a, b))).any(-1)
    a, b = (torch.where(finite, tensor, 0.0) for tensor in (a, b))
    difference = (a - b).nan_to_num(0.0, 0.0, 0.0)
    norms = torch.stack([b.abs().amax(-1), b.square().mean(-1).sqrt()])
    errors = torch.stack([difference.abs().amax(-1), difference.square().mean(-1).sqrt()])
    floor = 1e-3 * norms.amax(-1, keepdim=True) if len(b) else norms
    errors = errors / norms.maximum(floor).clamp(min=1e-30)
    return torch.where(odd, math.inf, errors)


def of_distinct_rows(errors: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """`errors` [..., rows] with the greatest of each set of rows that are equal in `exact`: rows of
    padding round alike, and are one sample of how a row rounds, however many they are."""
    if not exact.is_floating_point() or errors.shape[-1] < 2:
        return errors
    rows = exact.reshape(errors.shape[-1], -1).to(torch.float64, copy=True)
    # equal rows have equal sums; a fixed irrational step makes those of other rows differ
    weights = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64).mul(math.sqrt(2)).frac() + 1
    sums = rows.nan_to_num_().mul_(weights).sum(-1)
    _, group = torch.unique(sums, return_inverse=True)
    size = (*errors.shape[:-1], int(group.max()) + 1)
    index = group.expand(errors.shape)
    return torch.zeros(size, dtype=errors.dtype).scatter_reduce(-1, index, errors, "amax")


def _same_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def meaning_excess(
    results: Sequence[Sequence[torch.Tensor]],
    exact: Sequence[Sequence[torch.Tensor]],
    folded: Sequence[Sequence[torch.Tensor]],
    unit: float = 0.0,
) -> Excess | None:
    """How results in float32, those of each case, are more than reordered sums, or errors of rows
    by `unit`, away from eager's in float32; None where they are not. The yardstick is the error of
    `folded`, the captured graph in float32 with its constants folded in 16 bits."""
    for number in range(min(map(len, exact), default=0)):
        ours, yardstick = (
            torch.cat(
                [row_distances(a[number], b[number]) for a, b in zip(each, exact, strict=True)], 1
            )
            for each in (results, folded)
        )
        for errors, allowed in zip(ours, yardstick, strict=True):
            more = excess(errors, allowed[None], max(FLOAT32_UNIT, unit))
            if more is not None:
                return more
    return None


@dataclass(frozen=True)
class RowsBeyond:
    """Results in float32, in each case, some rows of which differ by more than `limit` from the
    `exact` ones. `errors` f64[rows] are those of each output; explained ones are 0."""

    exact: Sequence[Sequence[torch.Tensor]]
    errors: tuple[torch.Tensor, ...]
    limit: float

    def explained_by(self, sample: Sequence[Sequence[torch.Tensor]]) -> RowsBeyond | None:
        """What is left where another right result moves the same rows as far: a token that goes to
        another of two experts with equal scores moves what follows it in its text. None without
        any."""
        moved = _errors_of_rows(sample, self.exact)
        pairs = zip(self.errors, moved, strict=True)
        left = tuple(torch.where(e <= FACTOR * allowed, 0.0, e) for e, allowed in pairs)
        beyond = any(bool((errors > self.limit).any()) for errors in left)
        return replace(self, errors=left) if beyond else None

    def __str__(self) -> str:
        errors = torch.cat(self.errors)
        return (
            f"{int((errors > self.limit).sum())} of {len(errors)} rows differ from eager in "
            f"float32, by up to {float(errors.max()):.1e} of their greatest value, and at most "
            f"{self.limit:.0e} is allowed"
        )


def rows_beyond(
    results: Sequence[Sequence[torch.Tensor]],
    exact: Sequence[Sequence[torch.Tensor]],
    limit: float,
) -> RowsBeyond | None:
    """Those of results in float32, in each case; None without any."""
    errors = tuple(_errors_of_rows(results, exact))
    beyond = any(bool((of_output > limit).any()) for of_output in errors)
    return RowsBeyond(exact, errors, limit) if beyond else None


def _errors_of_rows(
    results: Sequence[Sequence[torch.Tensor]], exact: Sequence[Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """For each output, f64[rows] of all cases by `row_distances`."""
    return [
        torch.cat([row_distances(a[n], b[n])[0] for a, b in zip(results, exact, strict=True)])
        for n in range(min(map(len, exact), default=0))
    ]


@dataclass(frozen=True)
class Excess:
    """More error than rounding: `ours` and `eager` are the numbers of rows above a threshold, or
    with `mean` the mean errors of the `rows` without the worst."""

    ours: float
    eager: float
    threshold: float
    rows: int
    mean: bool = False

    def __str__(self) -> str:
        if self.threshold == math.inf:
            return f"{self.ours:.0f} of {self.rows} rows have NaN or infinities that eager has not"
        if self.mean:
            return (
                f"the mean error of a row is {self.ours:.1e} against eager in float32, and "
                f"rounding explains {self.eager:.1e}"
            )
        return (
            f"{self.ours:.0f} of {self.rows} rows differ from eager in float32 by more than "
            f"{self.threshold:.1e} of their greatest value, and rounding explains {self.eager:.0f}"
        )


def excess(ours: torch.Tensor, samples: torch.Tensor, unit: float) -> Excess | None:
    """How errors of rows, f64[rows], are more than those of any of eager's samples, f64[samples,
    rows]; None where they are not. An infinite error is no chance."""
    rows = len(ours)
    if not rows:
        return None
    if infinite := int((ours.isinf() & ~samples.isinf().any(0)).sum()):
        return Excess(infinite, 0, math.inf, rows)
    pooled = samples.flatten().sort().values
    picks = torch.linspace(0, len(pooled) - 1, min(_SHARES, len(pooled))).long()
    for threshold in sorted(set(pooled[picks].clamp(min=unit).tolist())):
        above = int((ours > FACTOR * threshold).sum())
        reference = int((samples > threshold).sum(-1).max())
        if above > reference + _CHANCE * math.sqrt(reference + _RARE * rows):
            return Excess(above, reference, FACTOR * threshold, rows)
    ranked, ordered = ours.sort().values, samples.sort().values
    for share in _TRIMMED:
        count = max(1, int(share * rows))
        mean, reference_mean = (
            float(ranked[:count].mean()),
            float(ordered[:, :count].mean(-1).max()),
        )
        slack = FACTOR * (1 + 2 / math.sqrt(count))
        if mean > slack * max(reference_mean, unit / 2):
            return Excess(mean, reference_mean, 0.0, count, mean=True)
    return None
