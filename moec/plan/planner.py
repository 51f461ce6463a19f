"""Computes a plan from a model, a cluster, a workload and the loads of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError
from moec.plan.bound_experts import place_bound
from moec.plan.cluster import Cluster
from moec.plan.coactivation import coactivation, place_together
from moec.plan.cost import CostModel, LayerCost
from moec.plan.degrees import SPARE, Degrees, legal
from moec.plan.eplb import rebalance
from moec.plan.model import Model
from moec.plan.placement import Placement, place
from moec.plan.plan import LayerPlan, Number, Plan
from moec.plan.search import LayerOption, search
from moec.plan.sends import count_sends, sample
from moec.plan.workload import Workload
from moec.runtime.routing_trace import RoutingTrace

Loads = NDArray[np.float64]


LEVEL = 1.005
"""Busiest over mean, below which copies of experts are not worth their slots."""


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

    def placement(self, layer: int, ranks: int, slots: int) -> Placement:
        key = (layer, ranks, slots)
        if key not in self._placements:
            loads = self.loads[layer]
            bound = place_bound(loads, self.groups, ranks).placement if self.groups else None
            self._placements[key] = bound or place(loads, ranks, slots)
        return self._placements[key]

    @cached_property
    def candidates(self) -> tuple[tuple[CostedDegrees, ...], ...]:
        """All legal degrees of each layer, with their costs."""
        return tuple(
            tuple(
                CostedDegrees(degrees, self.cost.layer(index, degrees))
                for degrees in self._legal(index)
                if not self._spare_is_useless(index, layer.experts, degrees)
            )
            for index, layer in enumerate(self.cost.layers)
        )

    def _legal(self, index: int) -> Iterator[Degrees]:
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
        layers = [
            [LayerOption(c.degrees.attention, c.cost.seconds, c.cost.memory) for c in options]
            for options in self.candidates
        ]
        solution = search(layers, self.cost.reshard, self.cost.memory_limit)
        if solution is None:
            raise UsageError(self._too_large())
        chosen = [self.candidates[i][choice] for i, choice in enumerate(solution.indices)]
        return self.plan([candidate.degrees for candidate in chosen], solution.seconds)

    def best_uniform(self) -> Plan:
        """The best plan with equal degrees, form and share of spare slots in all layers, as a grid
        search would find it. Raises UsageError where none fits."""
        table: list[dict[Degrees, CostedDegrees]] = []
        for options in self.candidates:
            first: dict[Degrees, CostedDegrees] = {}
            sizes: dict[Degrees, int] = {}
            for candidate in options:
                plain = replace(candidate.degrees, slots=0)
                sizes[plain] = sizes.get(plain, -1) + 1
                first[replace(plain, slots=sizes[plain])] = candidate
                for more in range(sizes[plain] + 1, len(self.spare)):
                    first[replace(plain, slots=more)] = candidate
            table.append(first)
        routed = [row for row, layer in zip(table, self.cost.layers, strict=True) if layer.experts]
        keys = list(routed[0]) if routed else list(table[0])
        best: tuple[float, list[CostedDegrees]] | None = None
        for key in keys:
            dense = Degrees(key.attention)
            rows = [row.get(key) or row.get(dense) for row in table]
            row = [candidate for candidate in rows if candidate is not None]
            total = sum(c.cost.seconds for c in row)
            fits = sum(c.cost.memory for c in row) <= self.cost.memory_limit
            if len(row) == len(table) and fits and (best is None or total < best[0]):
                best = (total, row)
        if best is None:
            raise UsageError(self._too_large())
        return self.plan([candidate.degrees for candidate in best[1]], best[0])

    def with_eplb(self, plan: Plan) -> Plan:
        """The degrees of `plan` with the placement of EPLB, which needs equal numbers of slots on
        all ranks: the greatest number of the plan's ranks."""
        layers = []
        for layer in plan.layers:
            if layer.experts:
                each = max(len(slots) for slots in layer.slots)
                row = self.loads[layer.layer][None, :]
                table = rebalance(row, each * layer.ranks, 1, 1, layer.ranks)[0]
                slots = tuple(tuple(r) for r in table.reshape(layer.ranks, each).tolist())
                layer = _with_slots(layer, slots)
            layers.append(layer)
        return _with_layers(plan, tuple(layers))

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
        layer, cost = self.cost.layers[index], self.cost.layer(index, degrees)
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
        by_load = self.placement(index, degrees.experts, degrees.slots)
        placement, bound = by_load, self._bound(index, degrees.experts)
        if self._sample is not None and not bound:
            meets = coactivation(self._sample, self._sparse.index(index), layer.experts)
            near = max(1, self.cluster.node_size // degrees.slices)
            placement = place_together(by_load, self.loads[index], meets, near)
        entry = LayerPlan(
            **plain,  # type: ignore[arg-type]
            ranks=degrees.experts,
            slices=degrees.slices,
            copies=degrees.copies(self.cluster.devices),
            form=degrees.form,
            slots=placement.slots,
            imbalance=placement.imbalance,
            bound=placement.bound_imbalance,
            groups=bound,
        )
        if self._sample is None:
            return entry
        ids = np.ascontiguousarray(self._sample.ids[:, self._sparse.index(index)])
        devices, node = self.cluster.devices, self.cluster.node_size
        return msgspec.structs.replace(
            entry, sends=count_sends(ids, entry, by_load.slots, devices, node)
        )

    def _bound(self, index: int, ranks: int) -> dict[str, tuple[int, int]]:
        """The first and the last rank of each group of experts."""
        if not self.groups:
            return {}
        ranks_of = place_bound(self.loads[index], self.groups, ranks).ranks
        return {name: (part[0], part[-1]) for name, part in ranks_of.items()}

    @cached_property
    def _sparse(self) -> list[int]:
        """The layers with experts, in the order of the trace's layers."""
        return [i for i, layer in enumerate(self.cost.layers) if layer.experts]

    @cached_property
    def _sample(self) -> RoutingTrace | None:
        return None if self.trace is None else sample(self.trace)

    def _too_large(self) -> str:
        least = sum(min(c.cost.memory for c in options) for options in self.candidates)
        limit = max(0.0, self.cost.memory_limit)
        return (
            f"{self.model.name} does not fit {self.cluster.name}: at least {least / 1e9:.1f} GB a "
            f"device for weights and caches, {limit / 1e9:.1f} GB are free; use more devices, "
            "fewer sequences or weights of fewer bits"
        )


def _with_slots(layer: LayerPlan, slots: tuple[tuple[int, ...], ...]) -> LayerPlan:
    return msgspec.structs.replace(layer, slots=slots, sends=None)


def _with_layers(plan: Plan, layers: tuple[LayerPlan, ...]) -> Plan:
    return msgspec.structs.replace(plan, layers=layers)
