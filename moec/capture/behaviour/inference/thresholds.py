"""Locates a threshold by running the module between a kept and a dropped choice."""

from __future__ import annotations

from dataclasses import replace

import torch

from moec.capture.behaviour.inference.fit import served_and_measure, shortest_number
from moec.capture.behaviour.inference.probe import Probe
from moec.capture.behaviour.layer.description import RoutingRule
from moec.capture.behaviour.layer.rules import choose

_ROUNDS = 4
"""Each round runs 96 rows between the two nearest choices; together they give six digits."""


def narrowed(
    probe: Probe,
    rule: RoutingRule,
    interval: tuple[float, float],
    logits: torch.Tensor,
    tokens: torch.Tensor,
) -> RoutingRule:
    """`rule` with the shortest number between the dropped and the kept choices as its threshold."""
    low, high = interval
    rows = tokens.numel() // probe.width
    for _ in range(_ROUNDS):
        choices = choose(rule, logits)
        assert choices.measure is not None
        nearest = [(choices.measure - value).abs() for value in (low, high)]
        k = choices.ids.shape[1]
        (row, slot), (other_row, other_slot) = (divmod(int(n.argmin()), k) for n in nearest)
        column, other_column = choices.ids[row, slot], choices.ids[other_row, other_slot]
        end = logits[other_row].clone()
        pair = [int(column), int(other_column)]
        end[pair] = end[pair[::-1]]
        logits = torch.lerp(logits[row], end, torch.linspace(0, 1, rows)[:, None])
        weights, _ = probe.solve(tokens, logits)
        served, measure = served_and_measure(choose(rule, logits), weights[:, : probe.columns])
        low = max([low, *measure[~served].tolist()])
        high = min([high, *measure[served].tolist()])
    if rule.threshold_on == "mass":
        return replace(rule, threshold=shortest_number(-high, -low))
    return replace(rule, threshold=shortest_number(low, high))
