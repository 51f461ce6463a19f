"""Finds what experts read, and how the logits are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from moec.capture.behaviour.inference.probe import Probe, SubmoduleCall
from moec.capture.behaviour.layer.description import Description, Path, Router
from moec.capture.behaviour.replacement import router_logits
from moec.errors import NoMatch
from moec.oracle.tolerance import are_close

_EXPLAINED = 1e-3
"""The greatest relative remainder, in float32, of an output that is a sum of the parts tried."""


def find_experts(
    probe: Probe, calls: Sequence[SubmoduleCall], tokens: torch.Tensor, logits: torch.Tensor
) -> None:
    """Completes the description with the source of what experts read.

    Raises NoMatch where the output is no weighted sum of the experts' results.
    """
    rows = [call.read for call in calls if call.name in probe.description.experts]
    if not rows:
        raise NoMatch(f"{probe.description.experts[0]} and its like are never called")
    probe.description = replace(probe.description, source=_source(probe, torch.cat(rows)))
    if probe.solve(tokens, logits)[1] > _EXPLAINED:
        raise NoMatch("its output is no weighted sum of what its experts and its other parts give")


def _source(probe: Probe, rows: torch.Tensor) -> Path:
    """The path of whose result every row that an expert read is a token."""
    rows = rows[rows.norm(dim=1) > 0]
    for path, value in probe.nodes.items():
        if value.shape[-1] != rows.shape[-1] or not len(rows):
            continue
        ids = (F.normalize(rows, dim=1) @ F.normalize(value, dim=1).T).argmax(1)
        if torch.allclose(rows, value[ids], rtol=1e-3, atol=1e-5):
            return path
    raise NoMatch(
        "its experts read rows that are no tokens of its input or of what a submodule makes of it"
    )


def find_router(probe: Probe, logits: torch.Tensor, flat: torch.Tensor) -> Router:
    """The router: a chain of submodules that computes logits [T, C], or a product with its weight.

    Raises NoMatch where neither does.
    """
    chains = [Router(path) for path in probe.nodes if path]
    products = [Router(path, probe.weight_name) for path in probe.nodes]
    for router in (*chains, *products):
        try:
            with torch.no_grad():
                candidate = router_logits(probe.module, Description(router=router), flat)
        except (RuntimeError, TypeError):
            continue
        if are_close(candidate, logits):
            return router
    raise NoMatch(
        f"what {probe.weight_name} multiplies is neither its input nor what submodules make of it"
    )
