"""Logits that distinguish routing rules, most of which natural logits do not exercise."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moec.capture.behaviour.layer.description import RoutingRule
from moec.capture.behaviour.layer.rules import choose


def all_on(column: int, rows: int, columns: int, size: float = 50.0) -> torch.Tensor:
    """Logits [rows, columns] by which every token chooses `column`."""
    return (F.one_hot(torch.full((rows,), column), columns) * 2.0 - 1) * size


def draws(columns: int, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Logits [rows, columns] of each kind: usual, wide, nearly equal, saturated, one alone, with
    sums of scores near an epsilon, and all high."""

    def normal() -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    ids = torch.randint(0, columns, (rows,), generator=generator)
    return {
        "usual": normal(),
        "wide": 4 * normal(),
        "flat": 0.05 * normal(),
        "extreme": 30 * normal(),
        "one": 100.0 * F.one_hot(ids, columns) - 50,
        "low": normal() - 45,
        "lower": normal() - 60,
        "high": normal() + 20,
    }


def ties(columns: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 3, (rows, columns), generator=generator).float()


def near_threshold(
    rule: RoutingRule, columns: int, rows: int, generator: torch.Generator
) -> torch.Tensor:
    """Logits [rows, columns]; for a rule with a threshold, those of many draws that have a choice
    nearest to it."""
    many = torch.randn(20000 if rule.threshold_on else rows, columns, generator=generator) * 2
    if not rule.threshold_on:
        return many
    measure = choose(rule, many).measure
    assert measure is not None
    distance = (measure.abs() - rule.threshold).abs().amin(1)
    return many[distance.argsort()[:rows]]
