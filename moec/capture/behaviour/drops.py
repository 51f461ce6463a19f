"""Capacities: all tokens are sent to one expert, at many lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction

import torch

from moec.capture.behaviour.description import Capacity
from moec.capture.behaviour.draws import all_on
from moec.capture.behaviour.probe import Probe
from moec.capture.behaviour.replacement import capacity_rows
from moec.errors import NoMatch

_LENGTHS = (*range(1, 41), 64, 100, 128, 200, 255, 512, 1000, 2000)


def find_capacity(probe: Probe, count: int) -> Capacity | None:
    """How many rows an expert takes, which, and what the dropped become; None where it takes all.

    Raises NoMatch where rows are dropped by another rule than first come, first served, or by
    no formula of the length that is tried.
    """
    kept, weights = _kept(probe, 2, probe.longest // 2 + 1)
    if kept.all():
        return None
    first, second = kept.view(2, -1)
    if _prefix(kept):
        per = "all"
    elif _prefix(first) and torch.equal(first, second):
        per = "sequence"
    else:
        raise NoMatch("an expert drops rows, and not the last that came")
    dropped = _dropped(kept, weights, count)
    lengths = (*(n for n in _LENGTHS if n < probe.longest), probe.longest)
    table = {n: int(_kept(probe, 1, n)[0].sum()) for n in lengths}
    for least, up in itertools.product(range(max(table.values()) + 1), (False, True)):
        capacity = Capacity(per, least, _factor(table, least, up, probe.columns), up, dropped)
        fits = (min(n, capacity_rows(capacity, n, probe.columns)) == c for n, c in table.items())
        if all(fits):
            return capacity
    raise NoMatch(
        "an expert drops rows, by no formula of the length that is tried: it takes "
        + ", ".join(f"{taken} of {n}" for n, taken in table.items() if taken < n)[:200]
    )


def _kept(probe: Probe, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = all_on(0, batch * length, probe.columns, 10.0)
    weights, _ = probe.solve(probe.inputs(batch, length), logits)
    return weights[:, 0].abs() > 1e-3, weights


def _prefix(kept: torch.Tensor) -> bool:
    return bool((kept[1:] <= kept[:-1]).all())


def _dropped(kept: torch.Tensor, weights: torch.Tensor, count: int) -> str:
    """What takes a dropped row's place, by the token's own share of the output."""
    lost = weights[~kept, min(count, weights.shape[1] - 1)]
    usual = float(weights[kept, 0].median())
    for kind, share in (("zero", 0.0), ("weighted", usual), ("pass", 1.0)):
        if (lost - share).abs().max() < 1e-3:
            return kind
    raise NoMatch("an expert drops rows, and what takes their place is neither zero nor the token")


def _factor(table: Mapping[int, int], least: int, up: bool, columns: int) -> Fraction:
    """The simplest factor whose capacities are those of the lengths that overflow."""
    rows = [(n, taken) for n, taken in table.items() if least < taken < n]
    low = max([Fraction((c - up) * columns, n) for n, c in rows], default=Fraction(0))
    high = min([Fraction((c + 1 - up) * columns, n) for n, c in rows], default=Fraction(0))
    fractions = (Fraction(math.ceil(low * q), q) for q in range(1, 101))
    return next((f for f in fractions if f <= high), Fraction(0))
