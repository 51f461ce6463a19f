"""Fits routing rules to solved expert weights, simplest rules first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from moec.capture.behaviour.layer.description import RoutingRule
from moec.capture.behaviour.layer.rules import SCORES, Choices, choose
from moec.errors import NoMatch

_SMALL = 1e-4
"""Solved weights below this count as zero: least squares leaves smaller residues."""


@dataclass(frozen=True)
class Fitted:
    """A rule and, where it has a threshold, the interval that contains the threshold."""

    rule: RoutingRule
    interval: tuple[float, float] | None = None


@dataclass
class _Nearest:
    """The rule that is right for the most rows so far, for the message of a refusal."""

    rows: int = -1
    text: str = "none comes near"


def fit(
    logits: torch.Tensor, weights: torch.Tensor, corrections: Mapping[str, torch.Tensor]
) -> Iterator[Fitted]:
    """The rules by which logits [T, C] give the experts the weights [T, C].

    Raises NoMatch where there is none, with the nearest rule and a row on which it is wrong.
    """
    nearest, count, columns = _Nearest(), 0, logits.shape[1]
    most = max(1, int((weights.abs() > _SMALL).sum(1).max()))
    plain = _plain(range(most, min(columns, most + 16) + 1))
    fewest = [rule for rule in plain if rule.top_k == most]
    families = (
        *_families(fewest, columns),
        *_families([rule for rule in plain if rule.top_k > most], columns),
    )
    for rules in families:
        for rule in itertools.chain(
            rules, (replace(r, correction=name) for name in corrections for r in rules)
        ):
            scaled = _scaled(rule, logits, weights, corrections.get(rule.correction), nearest)
            if scaled is not None:
                count += 1
                yield Fitted(scaled)
        if count:
            return
    for rule, kind in itertools.product(plain, ("weight", "score", "mass")):
        for fitted in _with_threshold(replace(rule, threshold_on=kind), logits, weights, nearest):
            count += 1
            yield fitted
    if not count:
        raise NoMatch(f"no routing rule that is tried gives the weights observed: {nearest.text}")


def _plain(ks: Iterable[int]) -> list[RoutingRule]:
    forms = [
        (score, by) for score in SCORES for by in ("score", "logits")
        if by == "score" or score != "softmax"
    ]  # fmt: skip
    return [
        RoutingRule(score, k, renormalise, ranked_by=by)
        for k in ks
        for score, by in forms
        for renormalise in (False, True)
    ]


def _families(plain: list[RoutingRule], columns: int) -> Iterator[list[RoutingRule]]:
    """Rules without a threshold: first without groups, with and without an epsilon; then the same
    with groups."""
    normed = [r for r in plain if r.renormalise and r.score != "softmax"]
    usual = plain + [
        replace(r, eps=eps, eps_is_floor=floor)
        for r in normed
        for eps in (1e-20, 1e-12, 1e-9, 1e-8, 1e-6)
        for floor in (False, True)
    ]
    yield usual
    yield [
        replace(r, groups=(count, top, best))
        for count in range(2, columns)
        if columns % count == 0
        for top in range(1, count)
        for best in (1, 2)
        if best <= columns // count
        for r in usual
        if r.top_k <= top * columns // count
    ]


def _scaled(
    rule: RoutingRule,
    logits: torch.Tensor,
    weights: torch.Tensor,
    correction: torch.Tensor | None,
    nearest: _Nearest,
) -> RoutingRule | None:
    """The rule with the scale by which it gives the weights; None if no scale does."""
    if nearest.rows >= 0 and not _may_fit(rule, logits, weights, correction):
        return None
    ruled = choose(rule, logits, correction).dense()
    big = ruled.abs() > 1e-2 * ruled.abs().amax(1, keepdim=True).clamp(min=1e-3)
    scale = float((weights[big] / ruled[big]).median()) if big.any() else 0.0
    short = float(f"{scale:.3g}")
    scale = short if abs(short - scale) < 1e-4 * abs(scale) else scale
    limit = 1e-3 * weights.abs().amax(1, keepdim=True).clamp(min=2e-2)
    right = ((weights - scale * ruled).abs() <= limit).all(1)
    if not scale:
        return None
    if right.all():
        return replace(rule, scale=scale)
    if int(right.sum()) > nearest.rows:
        i = int((~right).nonzero()[0])
        row, observed, ruled_row = (
            [round(float(v), 4) for v in t[i]] for t in (logits, weights, scale * ruled)
        )
        nearest.rows = int(right.sum())
        nearest.text = (
            f"the nearest is {replace(rule, scale=scale)}, right for {nearest.rows} of "
            f"{len(right)} rows; logits {row} give {observed}, not {ruled_row}"
        )
    return None


def _may_fit(
    rule: RoutingRule,
    logits: torch.Tensor,
    weights: torch.Tensor,
    correction: torch.Tensor | None,
) -> bool:
    """Whether the rule chooses the observed experts in a sample of rows of each kind of logits."""
    step = max(1, len(logits) // 40)
    few = weights[::step]
    ruled = choose(rule, logits[::step], correction).dense()
    clear = few.abs() > 1e-2 * few.abs().amax(1, keepdim=True).clamp(min=2e-2)
    return not bool((clear & (ruled == 0)).any())


def _with_threshold(
    rule: RoutingRule, logits: torch.Tensor, weights: torch.Tensor, nearest: _Nearest
) -> Iterator[Fitted]:
    """The rule with a threshold between dropped and kept choices, if these are separated."""
    choices = choose(rule, logits)
    assert choices.measure is not None
    assert choices.full_weights is not None
    observed = weights.gather(1, choices.ids).abs() > _SMALL
    dropped = choices.measure[~observed & (choices.full_weights.abs() > 3e-4)]
    served = choices.measure[observed]
    if not len(dropped) or not len(served) or not dropped.max() < served.min():
        return
    low, high = float(dropped.max()), float(served.min())
    threshold = (low + high) / 2 * (-1 if rule.threshold_on == "mass" else 1)
    for again in (False, True):
        guess = replace(rule, threshold=threshold, renormalise_again=again)
        scaled = _scaled(guess, logits, weights, None, nearest)
        if scaled is not None:
            yield Fitted(scaled, (low, high))


def shortest_number(low: float, high: float) -> float:
    """The number with the fewest decimal digits between two bounds."""
    for digits in range(8):
        candidate = math.ceil(low * 10**digits)
        if candidate <= high * 10**digits:
            return float(candidate / 10**digits)
    return (low + high) / 2


def served_and_measure(
    choices: Choices, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, measure) of each choice of an expert with a weight that is not negligible: whether it
    was kept, and the value that is compared with the threshold."""
    assert choices.measure is not None
    assert choices.full_weights is not None
    weighty = choices.full_weights.abs() > 3e-4
    observed = weights.gather(1, choices.ids).abs() > _SMALL
    return observed[weighty], choices.measure[weighty]
