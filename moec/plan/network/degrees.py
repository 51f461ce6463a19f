"""The parallel degrees that a layer may have.

p = attention degree (tensor) x data degree = experts degree (EP) x slices x expert-data degree. The
slices of an expert are on neighbouring ranks, then the ranks of an expert group follow; copies for
data parallelism are farthest apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moec.plan.inputs.model import Layers
from moec.plan.network.cluster import Cluster
from moec.plan.network.exchange import STAGED, Form

SPARE = (0.0, 0.0625, 0.125, 0.25)
"""Slots for copies of hot experts, as shares of the number of experts."""


@dataclass(frozen=True, order=True)
class Degrees:
    """`attention` ranks share a layer's attention and dense products; `experts` ranks (EP) share
    the experts, each of which is cut into `slices`; `slots` is the number of copies of experts on
    these ranks in total."""

    attention: int
    experts: int = 1
    slices: int = 1
    slots: int = 0
    form: Form = "flat"

    def copies(self, devices: int) -> int:
        """The number of expert groups that hold the same experts: their data degree."""
        return devices // (self.experts * self.slices)


def divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def attention_degrees(layer: Layers, cluster: Cluster) -> list[int]:
    """The attention degrees within a node that divide the heads evenly."""
    return [
        degree
        for degree in divisors(cluster.devices)
        if degree <= cluster.node_size and layer.heads % degree == 0
    ]


def legal(layer: Layers, cluster: Cluster, spare: tuple[float, ...] = SPARE) -> Iterator[Degrees]:
    """Every combination of degrees that a layer may have, in a fixed order."""
    for attention in attention_degrees(layer, cluster):
        if not layer.experts:
            yield Degrees(attention)
            continue
        for slices in divisors(cluster.devices):
            if slices > cluster.node_size or layer.hidden % slices:
                continue
            for experts in divisors(cluster.devices // slices):
                for slots in _slots(layer.experts, experts, spare):
                    for form in _forms(experts, slices, cluster):
                        yield Degrees(attention, experts, slices, slots, form)


def _slots(experts: int, ranks: int, spare: tuple[float, ...]) -> list[int]:
    """The numbers of slots to try, at most one copy of each expert on each rank."""
    least = max(experts, ranks)
    if ranks == 1:
        return [experts]
    numbers = {min(experts * ranks, least + round(experts * share)) for share in spare}
    return sorted(numbers)


def _forms(experts: int, slices: int, cluster: Cluster) -> list[Form]:
    """The forms of exchange to try. With slices, rows are sent to one slice and gathered there;
    this coordinated exchange has fewer hops and bytes than a flat one to every slice. One-sided
    rows are forwarded, and the deduplicated form is never behind other stages."""
    forms: list[Form] = ["flat" if slices == 1 else "coordinated"]
    near = max(1, cluster.node_size // slices)
    if experts > near and experts % near == 0 and near > 1:
        forms += ("deduplicated",) if cluster.one_sided else STAGED
    return forms
