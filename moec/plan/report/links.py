"""The loads of the links of a plan: rows that leave or reach a node, or a device of one node."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moec.plan.plan import LayerPlan, Plan
from moec.plan.search.planner import Planner
from moec.plan.simulation.simulate import Ids, Traffic, drawn, of_trace, sample, traffic

DRAWN = 16_384
"""Tokens that are drawn where there is no trace."""


def link_loads(plan: Plan, planner: Planner) -> list[NDArray[np.float64]]:
    """The rows on the busier direction of each link, by MoE layer: [nodes], or [devices] where all
    devices are on one node. Rows are those of the trace, or else drawn by the loads."""
    layers = [layer for layer in plan.layers if layer.experts]
    return [
        _loads(traffic(ids, layer, plan.devices, plan.node_size), plan)
        for layer, ids in zip(layers, _choices(layers, planner), strict=True)
    ]


def _choices(layers: Iterable[LayerPlan], planner: Planner) -> Iterable[Ids]:
    if planner.trace is not None:
        return of_trace(sample(planner.trace))
    numbers = [layer.layer for layer in layers]
    loads = [planner.loads[number] for number in numbers]
    return drawn(loads, [planner.cost.layers[number].k for number in numbers], DRAWN)


def _loads(counts: Traffic, plan: Plan) -> NDArray[np.float64]:
    nodes = plan.devices // plan.node_size
    if nodes == 1:
        sent, received = counts.sent_inside, counts.got_inside
    else:
        ways = (counts.sent_across, counts.got_across)
        sent, received = (way.reshape(nodes, -1).sum(1) for way in ways)
    loads: NDArray[np.float64] = np.maximum(sent, received).astype(float)
    return loads
