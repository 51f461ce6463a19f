"""Predicts seconds and bytes of one layer for given degrees: products, exchange, collectives.

A layer takes as long as its slowest rank, so products and links are computed for the busiest rank
of the placement. T tokens a rank, k experts a token, D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from msgspec.structs import replace

from moec.plan.inputs.model import Layers, Model
from moec.plan.inputs.workload import Workload, activations
from moec.plan.network.cluster import Cluster
from moec.plan.network.degrees import Degrees
from moec.plan.network.exchange import CALLS, collective_seconds, even_away, exchange, seconds
from moec.plan.placement.placement import Placement

CACHE_BYTES = 2.0
"""Bytes of a number in the KV cache, and of activations in collectives: bf16."""


@dataclass(frozen=True)
class LayerCost:
    """`parts` are seconds by part, of which `hidden` overlap with others; `memory` in bytes."""

    parts: Mapping[str, float]
    hidden: float
    memory: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values()) - self.hidden


@dataclass(frozen=True)
class CostModel:
    """Predicts costs. `placement(layer, ranks, slots)` places the experts of a layer."""

    model: Model
    cluster: Cluster
    workload: Workload
    placement: Callable[[int, int, int], Placement]
    _parts: dict[tuple[int, int], Mapping[str, float]] = field(default_factory=dict, repr=False)
    _routed: dict[tuple[float | str, ...], Mapping[str, float]] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def layers(self) -> tuple[Layers, ...]:
        return self.model.each_layer

    @cached_property
    def devices(self) -> int:
        return self.cluster.devices

    def layer(self, index: int, degrees: Degrees) -> LayerCost:
        """The cost of layer `index`."""
        busiest = 1.0
        if self.layers[index].experts:
            busiest = self.placement(index, degrees.experts, degrees.slots).imbalance
        return self.with_load(index, degrees, busiest, busiest)

    def with_load(
        self, index: int, degrees: Degrees, busiest: float, link: float, away: float | None = None
    ) -> LayerCost:
        """The cost of layer `index` where the load of the busiest rank is `busiest` times the mean,
        and the load of the busiest link is `link` times the mean. `away` is the number of other
        nodes that a token goes to, over its k experts; None assumes that all are equally likely."""
        layer = self.layers[index]
        parts, hidden, held = self._parts_of(index, degrees.attention), 0.0, 0
        if layer.experts:
            held = self.placement(index, degrees.experts, degrees.slots).most
            parts |= self._parts_of_experts(index, degrees, held, busiest, link, away)
            if self.workload.overlap:
                moved = parts["exchange out"] + parts["exchange back"]
                hidden = min(moved, sum(parts.values()) - moved)
            elif layer.dense_hidden:
                hidden = min(parts["dense"], parts["exchange out"])
        if sums := self._gradients(layer, degrees, held):
            parts["gradients"] = sums
        return LayerCost(parts, hidden, self._memory(layer, degrees, held, busiest))

    def reshard(self, one: int, two: int) -> float:
        """Seconds to gather activations between layers with different attention degrees."""
        if one == two:
            return 0.0
        wide = max(one, two)
        size = self.workload.tokens / self.devices * wide * self.model.width * CACHE_BYTES
        return collective_seconds("all_gather", size, wide, wide, self.cluster)

    @property
    def memory_limit(self) -> float:
        """Bytes of a device for weights and caches, without libraries, embedding and buffers."""
        device = self.cluster.device
        weights = self.workload.weight_bytes or self.model.bytes_per_weight
        ends = 2 * self.model.vocabulary * self.model.width * weights / self.cluster.node_size
        return device.memory.value - device.reserved.value - ends - self.buffers

    @property
    def buffers(self) -> float:
        """Bytes of rows in transit on a rank in both directions, with room for twice the mean."""
        most = max((layer.k for layer in self.model.layers), default=0)
        rows = self.workload.tokens / self.devices * most
        return 2 * rows * self.model.width * sum(self.workload.row_bytes)

    @cached_property
    def _half(self) -> CostModel:
        """The costs of one of two micro-batches."""
        work = self.workload
        tokens, sequences = -(-work.tokens // 2), -(-work.sequences // 2)
        half = replace(work, tokens=tokens, sequences=sequences, overlap=False)
        return CostModel(self.model, self.cluster, half, self.placement)

    def _parts_of(self, index: int, degree: int) -> dict[str, float]:
        """The parts that depend only on the attention degree, cached."""
        if self.workload.overlap:
            return _twice(self._half._parts_of(index, degree))
        if (index, degree) not in self._parts:
            layer = self.layers[index]
            self._parts[index, degree] = {
                "attention": self._attention(layer, degree),
                "dense": self._dense(layer, degree),
                "collectives": self._collectives(layer, degree),
            }
        return dict(self._parts[index, degree])

    def _parts_of_experts(
        self, index: int, degrees: Degrees, held: int, busiest: float, link: float,
        away: float | None,
    ) -> Mapping[str, float]:  # fmt: skip
        """The parts that do not depend on the attention degree, cached."""
        if self.workload.overlap:
            half = self._half._parts_of_experts(index, degrees, held, busiest, link, away)
            return _twice(half)
        form, sizes = degrees.form, (degrees.experts, degrees.slices, degrees.slots)
        key = (index, form, *sizes, busiest, link, -1.0 if away is None else away)
        if key not in self._routed:
            layer = self.layers[index]
            self._routed[key] = {
                **self._routing(layer),
                **self._experts(layer, degrees, held, busiest),
                **self._exchanges(layer, degrees, link, away),
            }
        return self._routed[key]

    def _roofline(self, flop: float, size: float) -> float:
        device = self.cluster.device
        rate = self.cluster.flops(self.workload.compute).value * device.efficiency.value
        return max(flop / rate, size / (device.memory_bandwidth.value * device.efficiency.value))

    def _attention(self, layer: Layers, degree: int) -> float:
        work, share = self.workload, 1 / self.devices
        tokens = work.tokens * share
        pairs = work.attended * layer.pair_flop(decode=work.phase == "decode")
        flop = work.passes * tokens * (2 * layer.attention + pairs)
        size = layer.attention * self.model.bytes_per_weight / degree + self._cache(layer, degree)
        return self._roofline(flop, size)

    def _cache(self, layer: Layers, degree: int) -> float:
        """Bytes of a rank's share of a layer's KV cache, which training does not have."""
        if self.workload.phase == "training":
            return 0.0
        numbers = self.workload.sequences * self.workload.context * layer.kv_values
        copies = degree / min(degree, layer.kv_heads)
        return numbers * CACHE_BYTES * copies / self.devices

    def _dense(self, layer: Layers, degree: int) -> float:
        parameters = self.model.dense_parameters(layer) - layer.attention
        flop = self.workload.passes * 2 * parameters * self.workload.tokens / self.devices
        return self._roofline(flop, parameters * self.model.bytes_per_weight / degree)

    def _experts(
        self, layer: Layers, degrees: Degrees, held: int, busiest: float
    ) -> dict[str, float]:
        work, model = self.workload, self.model
        k = _experts_of_token(layer)
        tokens = work.tokens / degrees.copies(self.devices)
        rows = busiest * tokens * k / degrees.experts
        parameters = model.expert_parameters(layer) / degrees.slices
        read = held * (1 - (1 - min(1.0, k / layer.experts)) ** tokens)
        moved = rows * CACHE_BYTES * (2 * model.width + layer.hidden / degrees.slices)
        size = read * parameters * model.bytes_per_weight + moved
        return {"experts": self._roofline(work.passes * 2 * rows * parameters, size)}

    def _routing(self, layer: Layers) -> dict[str, float]:
        """Router, dispatch and combine of a rank's own tokens, where the cluster has their rate."""
        rate = self.cluster.device.dispatch_bandwidth
        if rate is None:
            return {}
        rows = self.workload.tokens / self.devices * _experts_of_token(layer)
        return {"routing": rows * self.model.width * sum(self.workload.row_bytes) / rate.value}

    def _exchanges(
        self, layer: Layers, degrees: Degrees, link: float, away: float | None
    ) -> dict[str, float]:
        work, k = self.workload, _experts_of_token(layer)
        sent = work.tokens / self.devices * k * self.model.width * link
        if away is None and degrees.form == "deduplicated":
            nodes = degrees.experts * degrees.slices // self.cluster.node_size
            away = even_away(layer, nodes)
        ways = ("exchange out", "exchange back")
        return {
            way: self._exchange(degrees, sent * width, away or 0.0) * (2 if work.passes > 1 else 1)
            for way, width in zip(ways, work.row_bytes, strict=True)
        }

    def _exchange(self, degrees: Degrees, volume: float, away: float) -> float:
        """Seconds in one direction. In a flat exchange rows are sent to all slices of an expert,
        else to one of them, where the others gather them."""
        slices, span = degrees.slices, degrees.experts * degrees.slices
        if degrees.form == "flat":
            ranks, node, volume = span, self.cluster.node_size, volume * slices
            return seconds(exchange("flat", ranks, node, volume), self.cluster, span)
        node = max(1, self.cluster.node_size // slices)
        step = exchange(degrees.form, degrees.experts, node, volume, away)
        shared = 0.0
        if slices > 1:  # a gather also exchanges counts and slots
            shared = collective_seconds("all_gather", slices * volume, slices, slices, self.cluster)
            shared += (CALLS - 1) * self.cluster.level_of(slices).call_seconds
        return seconds(step, self.cluster, span) + shared

    def _collectives(self, layer: Layers, degree: int) -> float:
        """Collectives around attention and dense products: all-reduces, or reduce-scatter and
        all-gather in layers with experts."""
        work, cluster = self.workload, self.cluster
        size = work.tokens / cluster.devices * degree * self.model.width * CACHE_BYTES
        kinds = ("reduce_scatter", "all_gather") if layer.experts else ("all_reduce",) * 2
        total = sum(collective_seconds(kind, size, degree, degree, cluster) for kind in kinds)
        return total * (2 if work.passes > 1 else 1)

    def _gradients(self, layer: Layers, degrees: Degrees, held: int) -> float:
        """Training: seconds to sum gradients over the ranks that hold the same weights."""
        if self.workload.phase != "training":
            return 0.0
        cluster, devices = self.cluster, self.devices
        size = self.model.dense_parameters(layer) / degrees.attention * CACHE_BYTES
        data = devices // degrees.attention
        total = collective_seconds("all_reduce", size, data, devices, cluster)
        if layer.experts:
            size = held * self.model.expert_parameters(layer) / degrees.slices * CACHE_BYTES
            copies = degrees.copies(devices)
            total += collective_seconds("all_reduce", size, copies, devices, cluster)
        return total

    def _memory(self, layer: Layers, degrees: Degrees, held: int, busiest: float) -> float:
        weights = self.workload.weight_bytes or self.model.bytes_per_weight
        expert = held * self.model.expert_parameters(layer) / degrees.slices
        dense = self.model.dense_parameters(layer) / degrees.attention
        stored = (expert + dense) * weights + self._cache(layer, degrees.attention)
        return stored + self._activations(layer, degrees, busiest)

    def _activations(self, layer: Layers, degrees: Degrees, busiest: float) -> float:
        """Training: bytes that the backward pass needs. The ranks of an attention each hold some
        heads of all their tokens, or all heads of some; each slice holds rows of its own."""
        if self.workload.phase != "training":
            return 0.0
        of_token, of_row = activations(self.model, layer)
        tokens = self.workload.tokens / self.devices
        if not layer.experts:
            return tokens * of_token * CACHE_BYTES
        inputs = 2 * self.model.width * (degrees.slices - 1)
        rows = busiest * tokens * _experts_of_token(layer)
        return (tokens * of_token + rows * (of_row + inputs)) * CACHE_BYTES


def _experts_of_token(layer: Layers) -> float:
    """The mean number of experts with a network that a token goes to."""
    return layer.k * layer.experts / (layer.experts + layer.zero_experts)


def _twice(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: 2 * part for name, part in parts.items()}
