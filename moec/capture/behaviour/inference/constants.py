"""Finds the parts of the output that do not depend on routing, and columns without experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.capture.behaviour.inference.draws import all_on
from moec.capture.behaviour.inference.probe import Probe
from moec.capture.behaviour.layer.description import Added, NoNetwork, Path, RoutingRule
from moec.capture.behaviour.layer.rules import choose
from moec.errors import NoMatch

SAFE = 4
"""The number of first rows of a long run that are examined: no capacity drops them."""


def find_added(probe: Probe, inputs: Sequence[torch.Tensor], count: int) -> tuple[Added, ...]:
    """The terms that are added for every token, found with all tokens sent to one expert. Each is a
    chain of submodules times a constant, or times the sigmoid of a one-column submodule (a gate).

    Raises NoMatch where a coefficient varies by token and no gate explains it.
    """
    rows = inputs[0].numel() // probe.width
    weights, _ = probe.solve(inputs, all_on(0, rows, probe.columns))
    parts: list[Added] = []
    for path, factor in zip(probe.wide_paths(), weights[:SAFE, count:].T, strict=False):
        gate = next(
            (
                p for p, v in probe.nodes.items()
                if v.shape[-1] == 1 and torch.allclose(v[:SAFE, 0].sigmoid(), factor, atol=1e-3)
            ),
            (),
        )  # fmt: skip
        if factor.max() - factor.min() > 1e-3 and not gate:
            name = ".".join(path) or "the token itself"
            raise NoMatch(f"{name} is added with a weight that no gate of it gives")
        if factor.abs().max() > 1e-3:
            value = 1.0 if gate else float(f"{float(factor.mean()):.4g}")
            parts.append(Added(path, value, gate))
    return tuple(parts)


def find_no_network(
    probe: Probe,
    rule: RoutingRule,
    inputs: Sequence[torch.Tensor],
    count: int,
    added: tuple[Added, ...],
) -> tuple[NoNetwork, ...]:
    """What each router column beyond the experts computes, found by sending all tokens there.

    Raises NoMatch for a column that is neither zero, copy nor constant.
    """
    rows = [(name, i) for name, value in probe.constants for i in range(value.shape[1])]
    tokens = inputs[0].numel() // probe.width
    always = next((a.factor for a in added if not a.path), 0.0)
    parts = []
    for column in range(count, probe.columns):
        logits = all_on(column, tokens, probe.columns)
        probe.watch(inputs, logits)
        share = choose(rule, logits).dense()[:, column, None]
        weights = probe.solve(inputs, logits)[0] / share
        copied = weights[:, count] - always
        fixed = weights[:, count + len(probe.wide_paths()) :]
        parts.append(_no_network(probe, column, copied, fixed, rows))
    return tuple(parts)


def _no_network(
    probe: Probe,
    column: int,
    copied: torch.Tensor,
    fixed: torch.Tensor,
    rows: Sequence[tuple[str, int]],
) -> NoNetwork:
    if rows:
        used = int(fixed.abs().sum(0).argmax())
        shares = torch.stack([copied, fixed[:, used]], 1)
        mix: Path | None = next(
            (
                p for p, v in probe.nodes.items()
                if v.shape[-1] == 2 and torch.allclose(v.softmax(-1), shares, atol=1e-3)
            ),
            None,
        )  # fmt: skip
        if mix is not None:
            name, row = rows[used]
            return NoNetwork("constant", name, row, mix)
    for kind, value in (("zero", 0.0), ("copy", 1.0)):
        if (copied - value).abs().max() < 1e-3:
            return NoNetwork(kind)
    raise NoMatch(f"column {column} of the router is neither an expert nor zero, copy or constant")
