"""Finds the capacity of experts, by sending all tokens to one expert at many lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction

import torch

from moec.capture.behaviour.inference.draws import all_on
from moec.capture.behaviour.inference.probe import Probe
from moec.capture.behaviour.layer.description import Capacity
from moec.capture.behaviour.replacement import capacity_rows
from moec.errors import NoMatch

_LENGTHS = (*range(1, 41), 64, 100, 128, 200, 255, 512, 1000, 2000)


def find_capacity(probe: Probe) -> Capacity | None:
    """The capacity of the experts, and what dropped rows become; None where experts accept all
    rows.

    Raises NoMatch where the rows that an expert drops are not the last ones, or where none of the
    formulas that are tried gives their number.
    """
    served, weights = _served(probe, 2, probe.longest // 2 + 1)
    if served.all():
        return None
    first, second = served.view(2, -1)
    if _prefix(served):
        per = "all"
    elif _prefix(first) and torch.equal(first, second):
        per = "sequence"
    else:
        raise NoMatch("an expert drops rows, and not the last that came")
    dropped = _dropped(served, weights, probe.columns)
    lengths = (*(n for n in _LENGTHS if n < probe.longest), probe.longest)
    table = {n: int(_served(probe, 1, n)[0].sum()) for n in lengths}
    # A smallest capacity that the table shows is one of its numbers, or fits as well as one.
    for least, up in itertools.product(sorted({0, *table.values()}), (False, True)):
        capacity = Capacity(per, least, _factor(table, least, up, probe.columns), up, dropped)
        fits = (min(n, capacity_rows(capacity, n, probe.columns)) == c for n, c in table.items())
        if all(fits):
            return capacity
    raise NoMatch(
        "an expert drops rows, by no formula of the length that is tried: it takes "
        + ", ".join(f"{rows} of {n}" for n, rows in table.items() if rows < n)[:200]
    )


def _served(probe: Probe, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = all_on(0, batch * length, probe.columns, 10.0)
    weights, _ = probe.solve(probe.tokens(batch, length), logits)
    return weights[:, 0].abs() > 1e-3, weights


def _prefix(served: torch.Tensor) -> bool:
    return bool((served[1:] <= served[:-1]).all())


def _dropped(served: torch.Tensor, weights: torch.Tensor, count: int) -> str:
    """What replaces a dropped row, by the token's share: "zero", "weighted" or "pass"."""
    dropped_share = weights[~served, count]
    usual = float(weights[served, 0].median())
    for kind, share in (("zero", 0.0), ("weighted", usual), ("pass", 1.0)):
        if (dropped_share - share).abs().max() < 1e-3:
            return kind
    raise NoMatch("an expert drops rows, and what takes their place is neither zero nor the token")


def _factor(table: Mapping[int, int], least: int, up: bool, columns: int) -> Fraction:
    """The simplest factor that gives the observed capacity at each length that overflows."""
    rows = [(n, rows) for n, rows in table.items() if least < rows < n]
    low = max([Fraction((c - up) * columns, n) for n, c in rows], default=Fraction(0))
    high = min([Fraction((c + 1 - up) * columns, n) for n, c in rows], default=Fraction(0))
    fractions = (Fraction(math.ceil(low * q), q) for q in range(1, 101))
    return next((f for f in fractions if f <= high), Fraction(0))
