"""To how many other nodes the rows of a trace go, where experts of one token are placed together.

In a deduplicated exchange a token goes to each node once, so these nodes are its cost. To place the
experts for all degrees would take minutes: the cost of most is estimated with experts on nodes
instead of ranks, and only degrees that are chosen have their experts placed and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from msgspec.structs import replace

from moec.plan.network.degrees import Degrees
from moec.plan.placement.coactivation import meetings, place_on_nodes, place_together
from moec.plan.placement.placement import Ids, Loads, Placement, place
from moec.plan.plan import LayerPlan, Sends
from moec.plan.simulation.simulate import Ids as Choices
from moec.plan.simulation.simulate import count_sends, traffic

COUNTED = 8192
"""Tokens that are counted for an estimate, at most."""


WORTH = 0.98
"""Nodes of a token over those with experts placed by load, above which they stay there: the swaps
fit the trace's chance, and cost balance."""


@dataclass(frozen=True)
class PlacedLayer:
    """`away` is the number of other nodes that a row goes to, over its experts."""

    placement: Placement
    sends: Sends
    away: float


@dataclass(frozen=True, eq=False)
class LayerReach:
    """The choices ids [T, K] of one MoE layer in a trace, and the loads [E] of its experts. Those
    that are `fixed` stay on the ranks of a placement by load."""

    ids: Choices
    loads: Loads
    node_size: int
    fixed: bool = False
    _estimates: dict[int, float] = field(default_factory=dict, repr=False)
    _placed: dict[tuple[int, int, int, bool], PlacedLayer] = field(default_factory=dict, repr=False)

    @cached_property
    def meets(self) -> Ids:
        """How many tokens chose both experts [E, E]."""
        return meetings(self.ids, len(self.loads))

    def away(self, degrees: Degrees) -> float:
        """The number of other nodes that a row goes to, over its experts: counted where
        `placed` was called for these degrees, else estimated."""
        if (result := self._placed.get(_key(degrees))) is not None:
            return result.away
        nodes = max(1, degrees.experts * degrees.slices // self.node_size)
        if nodes not in self._estimates:
            by_load = place(self.loads, nodes)
            together = place_on_nodes(by_load, self.loads, self.meets)
            ids = np.ascontiguousarray(self.ids[:: max(1, -(-len(self.ids) // COUNTED))])
            near, far = (
                traffic(ids, _layer(slots, len(self.loads), 1), nodes, 1).deduplicated
                for slots in (together, by_load.slots)
            )
            rows = max(1, int((ids >= 0).sum()))
            self._estimates[nodes] = (near if near <= WORTH * far else far) / rows
        return self._estimates[nodes]

    def is_placed(self, degrees: Degrees) -> bool:
        return _key(degrees) in self._placed

    def placed(self, degrees: Degrees, by_load: Placement) -> PlacedLayer:
        """The slots of `by_load`, moved by swaps where rows are sent once to a node. Other forms
        send a row for each expert, wherever it is; swaps would only load one rank with the tokens
        of one topic."""
        key = _key(degrees)
        if key not in self._placed:
            near = max(1, self.node_size // degrees.slices)
            together = by_load
            if degrees.form == "deduplicated" and not self.fixed:
                together = place_together(by_load, self.loads, self.meets, near)
            devices = degrees.experts * degrees.slices
            layer = _layer(together.slots, len(self.loads), degrees.slices)
            sends = count_sends(self.ids, layer, by_load.slots, devices, self.node_size)
            if sends.nodes > WORTH * sends.nodes_by_load:
                together = by_load
                sends = replace(sends, nodes=sends.nodes_by_load, ranks=sends.ranks_by_load)
            rows = max(1, int((self.ids >= 0).sum()))
            self._placed[key] = PlacedLayer(together, sends, sends.nodes * len(self.ids) / rows)
        return self._placed[key]


def _key(degrees: Degrees) -> tuple[int, int, int, bool]:
    """What the placement depends on."""
    once = degrees.form == "deduplicated"
    return degrees.experts, degrees.slices, degrees.slots, once


def _layer(slots: tuple[tuple[int, ...], ...], experts: int, slices: int) -> LayerPlan:
    return LayerPlan(
        layer=0, experts=experts, attention=1, ranks=len(slots), slices=slices, slots=slots,
        seconds={},
    )  # fmt: skip
