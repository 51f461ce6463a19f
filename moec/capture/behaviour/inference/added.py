"""Finds the parts of the output that do not depend on routing."""

from __future__ import annotations

import torch

from moec.capture.behaviour.inference.draws import all_on
from moec.capture.behaviour.inference.probe import Probe
from moec.capture.behaviour.layer.description import Added
from moec.errors import NoMatch

SAFE = 4
"""The number of first rows of a long run that are examined: no capacity drops them."""


def find_added(probe: Probe, tokens: torch.Tensor) -> tuple[Added, ...]:
    """The chains of submodules whose results are added for every token, found with all tokens sent
    to one expert.

    Raises NoMatch where one is added with a weight.
    """
    rows = tokens.numel() // probe.width
    weights, _ = probe.solve(tokens, all_on(0, rows, probe.columns))
    parts: list[Added] = []
    for path, factor in zip(probe.wide_paths(), weights[:SAFE, probe.columns :].T, strict=True):
        if factor.abs().max() < 1e-3:
            continue
        if (factor - 1).abs().max() > 1e-3:
            name = ".".join(path) or "the token itself"
            raise NoMatch(f"{name} is added with a weight that is not 1")
        parts.append(Added(path))
    return tuple(parts)
