"""Which rows of results differ by more than rounding, and which of these another right result moves
as far: eager with its constants folded in 16 bits, with the first of equal values chosen, with sums
in another order. There is no count of rows that may be anything: each is right or it is not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

FACTOR = 1.25
"""A row may be off by so many times what another right result moves it."""
UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}
"""The spacing of floats at 1. A smaller error of a row's greatest is the result's rounding."""
FLOAT32_UNIT = 2e-5
"""An error of a row in float32 by less is the rounding of reordered sums over dozens of layers."""
NOISE = 12**-0.5
"""The standard deviation of a rounding, in spacings of floats."""
FLOAT32_NOISE = 2.0**-22
"""That of sums of some hundred terms in float32, relative to the result: enough for a row between
two codes of 8 bits, or between two experts, to take the other."""
_TOGETHER = 1 << 20
"""Numbers whose errors are computed at once: logits in float64 take much memory."""


def row_distances(actual: torch.Tensor, exact: torch.Tensor, by_row: bool = True) -> torch.Tensor:
    """f64[rows]: for each row (all axes but the last) the greatest of its differences, relative to
    the greatest of the row in `exact`, or of all rows; inf where shapes, NaNs or infinities differ.
    Each integer is a row, of 0 or 1."""
    if actual.shape != exact.shape:
        return torch.full((1,), math.inf, dtype=torch.float64)
    if not exact.numel():
        return torch.zeros(0, dtype=torch.float64)
    actual, exact = real_parts(actual), real_parts(exact)
    if not exact.is_floating_point():
        return (actual != exact).reshape(-1).double()
    errors, norms = distances(actual, exact)
    most = norms.max()
    return errors / (norms.maximum(1e-3 * most) if by_row else most).clamp(min=1e-30)


def real_parts(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as pairs of floats, in a last axis that is twice as long; others as is."""
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor.resolve_conj().reshape(tensor.shape or (1,))).flatten(-2)


def distances(actual: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest difference of each row, and the greatest finite value of it in `exact`."""
    pairs = [_distances(a, b) for a, b in zip(_parts(actual), _parts(exact), strict=True)]
    errors, norms = zip(*pairs, strict=True)
    return torch.cat(errors), torch.cat(norms)


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows [rows, last axis] of a tensor in parts, each of few numbers."""
    width = tensor.shape[-1] if tensor.ndim else 1
    return torch.split(tensor.reshape(-1, width), max(1, _TOGETHER // max(1, width)))


def _distances(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `distances`, of few rows."""
    a, b = a.double(), b.double()
    finite = b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    odd = ((a.isfinite() != finite) | (~finite & ~same)).any(-1)
    difference = torch.where(finite, a - b, 0.0).nan_to_num(0.0, 0.0, 0.0).abs().amax(-1)
    return torch.where(odd, math.inf, difference), torch.where(finite, b, 0.0).abs().amax(-1)


@dataclass(frozen=True)
class RowsBeyond:
    """Results, in each case, some rows of which differ from the `exact` ones by more than the
    `limits` of the outputs. `errors` f64[rows] are those of each output; explained ones are 0."""

    exact: Sequence[Sequence[torch.Tensor]]
    errors: tuple[torch.Tensor, ...]
    limits: tuple[float, ...]
    by_row: bool

    def explained_by(self, sample: Sequence[Sequence[torch.Tensor]]) -> RowsBeyond | None:
        """What is left where another right result moves the same rows as far: a token that goes to
        another of two experts with equal scores moves what follows it in its text. None without
        any."""
        moved = errors_of_rows(sample, self.exact, self.by_row)
        pairs = zip(self.errors, moved, strict=True)
        explained = ((e, (e <= FACTOR * far) & (far.isfinite() | e.isinf())) for e, far in pairs)
        left = replace(self, errors=tuple(torch.where(is_, 0.0, e) for e, is_ in explained))
        return left if left.number is not None else None

    def agreeing_with(
        self, results: Sequence[Sequence[torch.Tensor]], sample: Sequence[Sequence[torch.Tensor]]
    ) -> RowsBeyond | None:
        """What is left where the same rows may also be those of another right result. None without
        any."""
        pairs = zip(self.errors, errors_of_rows(results, sample, self.by_row), strict=True)
        left = replace(self, errors=tuple(itertools.starmap(torch.minimum, pairs)))
        return left if left.number is not None else None

    @property
    def number(self) -> int | None:
        """The output that is furthest beyond its limit."""
        worst = [float(e.max()) if len(e) else 0.0 for e in self.errors]
        beyond = {n: w for n, w in enumerate(worst) if not w <= self.limits[n]}
        return max(beyond, key=lambda n: beyond[n] / max(self.limits[n], 1e-30), default=None)

    def __str__(self) -> str:
        errors, limit = self.errors[self.number or 0], self.limits[self.number or 0]
        rows = f"{int((errors > limit).sum())} of {len(errors)} rows"
        if bool(errors.isinf().any()):
            return f"{rows} differ from eager, by NaN or infinities that only one of them has"
        greatest = "their greatest value" if self.by_row else "its greatest value"
        return (
            f"differs from eager by {float(errors.max()):.1e} of {greatest} in {rows}, and at most "
            f"{limit:.0e} is allowed"
        )


def rows_beyond(
    results: Sequence[Sequence[torch.Tensor]],
    exact: Sequence[Sequence[torch.Tensor]],
    limits: float | Sequence[float],
    by_row: bool = True,
) -> RowsBeyond | None:
    """Those of results in each case; None without any."""
    errors = tuple(errors_of_rows(results, exact, by_row))
    each = (limits,) * len(errors) if isinstance(limits, float) else tuple(limits)
    beyond = RowsBeyond(exact, errors, each, by_row)
    return beyond if beyond.number is not None else None


def errors_of_rows(
    results: Sequence[Sequence[torch.Tensor]],
    exact: Sequence[Sequence[torch.Tensor]],
    by_row: bool = True,
) -> list[torch.Tensor]:
    """For each output, f64[rows] of all cases by `row_distances`."""
    pairs = list(zip(results, exact, strict=True))
    return [
        torch.cat([row_distances(a[n], b[n], by_row) for a, b in pairs])
        for n in range(min(map(len, exact), default=0))
    ]
