"""Finds what experts read, how stacked parameters form them, and how the logits are computed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from moec.capture.behaviour.inference.probe import Probe, SubmoduleCall
from moec.capture.behaviour.layer.description import Description, Path, Router
from moec.capture.behaviour.layer.feed_forward import feed_forwards
from moec.capture.behaviour.replacement import router_logits
from moec.errors import NoMatch
from moec.oracle.tolerance import are_close

EXPLAINED = 1e-3
"""The greatest relative remainder, in float32, of an output that is a sum of the parts tried."""
MOST_BODIES = 500
"""The most feed-forward networks that are tried on what a module reads: of stacks of four lists of
experts there are thousands."""


def find_experts(
    probe: Probe,
    calls: Sequence[SubmoduleCall],
    stacks: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    one: torch.Tensor,
    usual: torch.Tensor,
) -> None:
    """Completes the description: source, body, side of the weights, and whether the output is a
    log-sum-exp. `one` are logits that send each token to one expert.

    Raises NoMatch where the output is no weighted sum of the experts' results.
    """
    rows = [call.read for call in calls if call.name in probe.description.experts]
    if probe.description.experts and not rows:
        raise NoMatch(f"{probe.description.experts[0]} and its like are never called")
    if rows:
        _find_rows(probe, torch.cat(rows))
    else:
        _find_body(probe, stacks, inputs, one)
        if probe.solve(inputs, usual)[1] > EXPLAINED:
            probe.description = replace(probe.description, weighs="input")
    if probe.description.weighs == "output" and probe.solve(inputs, usual)[1] > EXPLAINED:
        _find_log_sum_exp(probe, inputs, usual)


def _find_rows(probe: Probe, rows: torch.Tensor) -> None:
    """Finds the path of whose result every row that an expert read is a token, scaled or not."""
    rows = rows[rows.norm(dim=1) > 0]
    for path, value in probe.nodes.items():
        if value.shape[-1] != rows.shape[-1] or not len(rows):
            continue
        cosine, ids = (F.normalize(rows, dim=1) @ F.normalize(value, dim=1).T).max(1)
        if cosine.min() > 1 - 1e-5:
            plain = torch.allclose(rows, value[ids], rtol=1e-3, atol=1e-5)
            side = "output" if plain else "input"
            probe.description = replace(probe.description, source=path, weighs=side)
            return
    raise NoMatch(
        "its experts read rows that are no tokens, scaled or not, of its input or of what a "
        "submodule makes of it"
    )


def _find_body(
    probe: Probe,
    stacks: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    one: torch.Tensor,
) -> None:
    hidden = probe.run(inputs, one).hidden
    for path in probe.wide_paths():
        bodies = feed_forwards(stacks, probe.width)
        for body, names in itertools.islice(bodies, MOST_BODIES):
            probe.description = Description(experts=names, body=body, source=path)
            if probe.solve(inputs, one, hidden)[1] < 1e-4:
                return
        if next(bodies, None) is not None:
            probe.description = Description()
            raise NoMatch(
                f"its {len(stacks)} stacked parameters form more than {MOST_BODIES} feed-forward "
                "networks"
            )
    probe.description = Description()
    raise NoMatch("no feed-forward network of its stacked parameters gives its output")


def _find_log_sum_exp(probe: Probe, inputs: Sequence[torch.Tensor], usual: torch.Tensor) -> None:
    probe.description = replace(probe.description, log_sum_exp=True)
    if probe.solve(inputs, usual)[1] > EXPLAINED:
        raise NoMatch("its output is no weighted sum of what its experts and its other parts give")
    if probe.description.body is None:
        probe.description = replace(probe.description, floor=_floor(probe, inputs))


def _floor(probe: Probe, inputs: Sequence[torch.Tensor]) -> float:
    """What replaces a sum of zero, found with results of -200, whose exponentials underflow."""
    handles = [
        probe.module.get_submodule(name).register_forward_hook(lambda m, i, o: o * 0 - 200)
        for name in probe.description.experts
    ]
    try:
        hidden = probe.run(inputs).hidden
    finally:
        for handle in handles:
            handle.remove()
    return float(f"{float(hidden.double().exp().mean()):.3g}")


def find_router(probe: Probe, logits: torch.Tensor, flat: torch.Tensor) -> Router:
    """The router: a chain of submodules that computes logits [T, C], or a product with its weight.

    Raises NoMatch where neither does.
    """
    biases = [name for name, p in probe.module.named_parameters() if p.shape == (probe.columns,)]
    paths: list[Path] = [path for path in probe.nodes if path]
    products = [
        Router(path, probe.weight_name, bias, cosine)
        for path in probe.nodes
        for cosine, bias in itertools.product((False, True), ("", *biases))
    ]
    for router in (*(Router(path) for path in paths), *products):
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
