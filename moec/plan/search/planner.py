"""Computes a plan from a model, a cluster, a workload and the loads of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError
from moec.plan.inputs.model import Layers, Model
from moec.plan.inputs.workload import Workload
from moec.plan.network.cluster import Cluster
from moec.plan.network.degrees import SPARE, Degrees, legal
from moec.plan.placement.bound_experts import place_bound
from moec.plan.placement.placement import Placement, place
from moec.plan.plan import LayerPlan, Number, Plan
from moec.plan.search.reach import LayerReach, PlacedLayer
from moec.plan.search.search import LayerOption, search
from moec.plan.simulation.cost import CostModel, LayerCost
from moec.plan.simulation.simulate import sample
from moec.runtime.call.routing_trace import RoutingTrace

Loads = NDArray[np.float64]


LEVEL = 1.005
"""Busiest over mean, below which copies of experts are not worth their slots."""
ROUNDS = 4
"""Searches, at most; each is of the costs that were counted for the plan of the one before."""


@dataclass(frozen=True)
class CostedDegrees:
    degrees: Degrees
    cost: LayerCost


@dataclass(frozen=True)
class Planner:
    """`loads[l]` are the shares of rows of the experts of layer l (empty for a dense layer),
    `routing` describes where they come from, `spare` are the shares of slots for copies. With a
    `trace` of the MoE layers, experts of one token are placed together; experts of a group of
    `groups` are on ranks that have no others, and without copies."""

    model: Model
    cluster: Cluster
    workload: Workload
    loads: tuple[Loads, ...]
    routing: str
    spare: tuple[float, ...] = SPARE
    trace: RoutingTrace | None = None
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    _placements: dict[tuple[int, int, int], Placement] = field(default_factory=dict, repr=False)
    _slots: dict[Layers | int, dict[Degrees, list[int]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.groups) > self.cluster.devices:
            raise UsageError(
                f"{len(self.groups)} groups of experts cannot have ranks of their own on the "
                f"{self.cluster.devices} devices of {self.cluster.name}"
            )
        for index, layer in enumerate(self.model.each_layer):
            if len(self.loads[index]) != layer.experts:
                raise UsageError(
                    f"layer {index} of {self.model.name} has {layer.experts} experts, the routing "
                    f"is of {len(self.loads[index])}"
                )

    @cached_property
    def cost(self) -> CostModel:
        return CostModel(self.model, self.cluster, self.workload, self.placement)

    @cached_property
    def _representatives(self) -> tuple[int, ...]:
        """For each layer, the first one of equal sizes and loads; without a trace, they cost the
        same."""
        first: dict[tuple[Layers | int, bytes], int] = {}
        keys = [
            (layer if self.trace is None else index, load.tobytes())
            for index, (layer, load) in enumerate(zip(self.cost.layers, self.loads, strict=True))
        ]
        return tuple(first.setdefault(key, index) for index, key in enumerate(keys))

    def placement(self, layer: int, ranks: int, slots: int) -> Placement:
        layer = self._representatives[layer]
        key = (layer, ranks, slots)
        if key not in self._placements:
            loads = self.loads[layer]
            bound = place_bound(loads, self.groups, ranks).placement if self.groups else None
            self._placements[key] = bound or place(loads, ranks, slots)
        return self._placements[key]

    @property
    def candidates(self) -> tuple[tuple[CostedDegrees, ...], ...]:
        """All legal degrees of each layer, with their costs, which are counted on the trace for
        those that a plan has had."""
        return tuple(map(self.candidates_of, range(len(self._costs))))

    def candidates_of(self, index: int) -> tuple[CostedDegrees, ...]:
        """Those of one layer."""
        return tuple(self._costs[index].values())

    @cached_property
    def _costs(self) -> list[dict[Degrees, CostedDegrees]]:
        result: list[dict[Degrees, CostedDegrees]] = []
        for index, layer in enumerate(self.cost.layers):
            if (first := self._representatives[index]) < index:
                result.append(dict(result[first]))
                continue
            result.append(
                {
                    degrees: CostedDegrees(degrees, self.layer_cost(index, degrees))
                    for degrees in self.legal(index)
                    if not self._spare_is_useless(index, layer.experts, degrees)
                }
            )
        return result

    def layer_cost(self, index: int, degrees: Degrees) -> LayerCost:
        """The cost of a layer. With a trace, a row of a deduplicated exchange goes to as many nodes
        as in the trace."""
        reach, index = self._reach(index), self._representatives[index]
        if reach is None or degrees.form != "deduplicated":
            return self.cost.layer(index, degrees)
        placement = self.placement(index, degrees.experts, degrees.slots)
        if reach.is_placed(degrees):
            placement = reach.placed(degrees, placement).placement
        busiest = placement.imbalance
        return self.cost.with_load(index, degrees, busiest, busiest, reach.away(degrees))

    def legal(self, index: int) -> Iterator[Degrees]:
        """The degrees that a layer may have."""
        layer = self.cost.layers[index]
        for degrees in legal(layer, self.cluster, (0.0,) if self.groups else self.spare):
            if not (self.groups and layer.experts):
                yield degrees
            elif degrees.experts >= len(self.groups):
                slots = self.placement(index, degrees.experts, 0).slots
                yield replace(degrees, slots=sum(map(len, slots)))

    def _spare_is_useless(self, index: int, experts: int, degrees: Degrees) -> bool:
        """Whether there are more slots than needed although the ranks are balanced without them."""
        least = max(experts, degrees.experts)
        if degrees.slots <= least or self.groups:
            return False
        return self.placement(index, degrees.experts, least).imbalance < LEVEL

    def best(self) -> Plan:
        """The best plan, whose degrees may differ between layers. Raises UsageError if none
        fits."""
        plans: list[tuple[float, int, tuple[Degrees, ...]]] = []
        for number in range(ROUNDS):
            degrees = self._with_copies(self._quickest())
            complete = self._count(degrees)
            plans.append((self.seconds(degrees), number, degrees))
            if complete:
                break
        seconds, _, least = min(plans)
        return self.plan(least, seconds)

    def _quickest(self) -> tuple[Degrees, ...]:
        """The degrees of least cost. Raises UsageError."""
        candidates = self.candidates
        layers = [
            [LayerOption(c.degrees.attention, c.cost.seconds, c.cost.memory) for c in options]
            for options in candidates
        ]
        solution = search(layers, self.cost.reshard, self.cost.memory_limit)
        if solution is None:
            raise UsageError(self.too_large())
        return tuple(
            options[at].degrees for options, at in zip(candidates, solution.indices, strict=True)
        )

    def _with_copies(self, degrees: Sequence[Degrees]) -> tuple[Degrees, ...]:
        """The degrees with as many copies as each layer is quickest with, in the order of the
        layers while there is memory; the search had none where they gain less than `LEVEL`."""
        result = list(degrees)
        room = self.cost.memory_limit - sum(
            self.layer_cost(index, entry).memory for index, entry in enumerate(degrees)
        )
        for index, entry in enumerate(degrees):
            cost = self.layer_cost(index, entry)
            for more in self.slots_of(index).get(replace(entry, slots=0), ()):
                other = self.layer_cost(index, option := replace(entry, slots=more))
                if other.seconds < cost.seconds and other.memory - cost.memory <= room:
                    room -= other.memory - cost.memory
                    result[index], cost = option, other
            self._costs[index].setdefault(result[index], CostedDegrees(result[index], cost))
        return tuple(result)

    def slots_of(self, index: int) -> dict[Degrees, list[int]]:
        """The numbers of slots that a layer may have, by its degrees without them."""
        key = index if self.groups else self.cost.layers[index]
        if key not in self._slots:
            numbers: dict[Degrees, list[int]] = {}
            for degrees in self.legal(index):
                numbers.setdefault(replace(degrees, slots=0), []).append(degrees.slots)
            self._slots[key] = numbers
        return self._slots[key]

    def _count(self, degrees: Sequence[Degrees]) -> bool:
        """Count on the trace the nodes of these degrees, whose costs were estimates; True if none
        was."""
        complete = True
        for index, entry in enumerate(degrees):
            reach = self._reach(index)
            if reach is None or entry.form != "deduplicated" or reach.is_placed(entry):
                continue
            complete = False
            self._placed(index, entry)
            costs = self._costs[index]
            for attention in {option.attention for option in costs}:
                same = replace(entry, attention=attention)
                if same in costs:
                    costs[same] = CostedDegrees(same, self.layer_cost(index, same))
        return complete

    def seconds(self, degrees: Sequence[Degrees]) -> float:
        """Predicted seconds of a step."""
        total = sum(self.layer_cost(i, entry).seconds for i, entry in enumerate(degrees))
        return total + sum(
            self.cost.reshard(a.attention, b.attention) for a, b in pairwise(degrees)
        )

    def plan(self, degrees: Sequence[Degrees], seconds: float) -> Plan:
        layers = tuple(self._layer(index, entry) for index, entry in enumerate(degrees))
        return Plan(
            model=self.model.name,
            cluster=self.cluster.name,
            devices=self.cluster.devices,
            node_size=self.cluster.node_size,
            workload=self.workload,
            routing=self.routing,
            layers=layers,
            seconds=seconds,
            memory=sum(layer.memory for layer in layers),
            memory_limit=self.cost.memory_limit,
            numbers=tuple(
                Number(name=name, value=q.value, source=q.source, note=q.note)
                for name, q in self.cluster.quantities()
            ),
        )

    def _layer(self, index: int, degrees: Degrees) -> LayerPlan:
        placed = self._placed(index, degrees)
        layer, cost = self.cost.layers[index], self.layer_cost(index, degrees)
        plain = {
            "layer": index,
            "experts": layer.experts,
            "attention": degrees.attention,
            "seconds": dict(cost.parts),
            "hidden": cost.hidden,
            "memory": cost.memory,
        }
        if not layer.experts:
            return LayerPlan(**plain)  # type: ignore[arg-type]
        placement = self.placement(index, degrees.experts, degrees.slots)
        if placed is not None:
            placement = placed.placement
        return LayerPlan(
            **plain,  # type: ignore[arg-type]
            ranks=degrees.experts,
            slices=degrees.slices,
            copies=degrees.copies(self.cluster.devices),
            form=degrees.form,
            slots=placement.slots,
            imbalance=placement.imbalance,
            bound=placement.bound_imbalance,
            groups=self._bound(index, degrees.experts),
            sends=None if placed is None else placed.sends,
        )

    def _placed(self, index: int, degrees: Degrees) -> PlacedLayer | None:
        """The experts of a layer as placed for the trace; None without one."""
        reach = self._reach(index)
        if reach is None:
            return None
        by_load = self.placement(index, degrees.experts, degrees.slots)
        return reach.placed(degrees, by_load)

    def _bound(self, index: int, ranks: int) -> dict[str, tuple[int, int]]:
        """The first and the last rank of each group of experts."""
        if not self.groups:
            return {}
        ranks_of = place_bound(self.loads[index], self.groups, ranks).ranks
        return {name: (part[0], part[-1]) for name, part in ranks_of.items()}

    def _reach(self, index: int) -> LayerReach | None:
        return self._reaches.get(index)

    @cached_property
    def _reaches(self) -> dict[int, LayerReach]:
        """The choices of each layer with experts, if there is a trace."""
        if self.trace is None:
            return {}
        layers = [index for index, layer in enumerate(self.cost.layers) if layer.experts]
        ids = np.ascontiguousarray(sample(self.trace).ids.transpose(1, 0, 2))
        size = self.cluster.node_size
        return {
            index: LayerReach(choices, self.loads[index], size, fixed=bool(self.groups))
            for index, choices in zip(layers, ids, strict=True)
        }

    def too_large(self) -> str:
        least = sum(min(c.cost.memory for c in options) for options in self.candidates)
        limit = max(0.0, self.cost.memory_limit)
        training = self.workload.phase == "training"
        stored, fewer = ("activations", "tokens") if training else ("caches", "sequences")
        return (
            f"{self.model.name} does not fit {self.cluster.name}: at least {least / 1e9:.1f} GB a "
            f"device for weights and {stored}, {limit / 1e9:.1f} GB are free; use more devices, "
            f"fewer {fewer} or weights of fewer bits"
        )


def best_uniform(planner: Planner) -> Plan:
    """The best plan with equal degrees, form and share of slots for copies in all layers with
    experts. Raises UsageError where none fits."""
    least = [_least_seconds(planner, index) for index in range(len(planner.cost.layers))]
    routed = [row for row, layer in zip(least, planner.cost.layers, strict=True) if layer.experts]
    keys = (routed or least)[0]
    totals = [(_total(least, key), key) for key in keys]
    slots = [planner.slots_of(index) for index in range(len(least))]
    best: tuple[float, Sequence[Degrees]] | None = None
    for bound, key in sorted((total, key) for total, key in totals if total is not None):
        if best is not None and bound > best[0] * LEVEL:
            break
        for grid in _grids(slots, key):
            costs = [planner.layer_cost(index, degrees) for index, degrees in enumerate(grid)]
            seconds = sum(cost.seconds for cost in costs)
            fits = sum(cost.memory for cost in costs) <= planner.cost.memory_limit
            if fits and (best is None or seconds < best[0]):
                best = seconds, grid
    if best is None:
        raise UsageError(planner.too_large())
    return planner.plan(best[1], best[0])


def _least_seconds(planner: Planner, index: int) -> dict[Degrees, float]:
    """The least seconds of a layer with any number of slots, by its degrees without them. Those
    that balanced ranks do not need are left out, which costs at most a factor of `LEVEL`."""
    least: dict[Degrees, float] = {}
    for candidate in planner.candidates_of(index):
        key = replace(candidate.degrees, slots=0)
        least[key] = min(least.get(key, float("inf")), candidate.cost.seconds)
    return least


def _total(least: Sequence[Mapping[Degrees, float]], key: Degrees) -> float | None:
    """The sum over the layers; None where one of them cannot have these degrees."""
    dense = Degrees(key.attention)
    rows = [row.get(key, row.get(dense)) for row in least]
    return None if None in rows else sum(row for row in rows if row is not None)


def _grids(
    slots: Sequence[Mapping[Degrees, Sequence[int]]], key: Degrees
) -> Iterator[tuple[Degrees, ...]]:
    """The degrees of all layers, by the share of slots for copies."""
    dense = Degrees(key.attention)
    rows = [(key, row[key]) if key in row else (dense, row[dense]) for row in slots]
    for share in range(max(len(numbers) for _, numbers in rows)):
        yield tuple(
            replace(degrees, slots=numbers[min(share, len(numbers) - 1)])
            for degrees, numbers in rows
        )
