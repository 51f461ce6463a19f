"""A cluster: devices and the levels of links between them, read from a file.

Level 0 joins devices to a node, level 1 joins nodes to a cluster or a part of one, and so on. Each
device reaches each level over its own link, or over one that `devices_per_link` devices share.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from moec.errors import UsageError
from moec.plan.inputs.files import Positive, Quantity, Record, read_preset_or_file


class ClusterDevice(Record, frozen=True, kw_only=True):
    """`memory` in bytes and `memory_bandwidth` in bytes/s. `flops` in FLOP/s by dtype. `efficiency`
    is the share of FLOP/s and bytes/s that kernels reach. `reserved` are bytes for libraries and
    the runtime. `dispatch_bandwidth` are bytes/s of rows through router, dispatch and combine;
    without it, rows are copied as fast as memory allows and routing is free."""

    name: str
    memory: Quantity
    reserved: Quantity
    memory_bandwidth: Quantity
    flops: dict[str, Quantity]
    efficiency: Quantity
    dispatch_bandwidth: Quantity | None = None

    @property
    def copy_bandwidth(self) -> float:
        """Bytes/s of rows that are sorted."""
        return (self.dispatch_bandwidth or self.memory_bandwidth).value


class Level(Record, frozen=True, kw_only=True):
    """Links that join `joins` units of the level below. `latency` of one message between devices in
    seconds, `bandwidth` of one link in one direction in bytes/s. `call` are the seconds of a
    collective besides its messages: the launch, and the wait for the last rank."""

    name: str
    joins: Positive
    latency: Quantity
    bandwidth: Quantity
    devices_per_link: Positive = 1
    call: Quantity | None = None

    @property
    def call_seconds(self) -> float:
        return self.call.value if self.call else 0.0

    def share(self) -> float:
        """The bytes/s of each device while all devices send."""
        return self.bandwidth.value / self.devices_per_link


class Cluster(Record, frozen=True, kw_only=True):
    """`one_sided` are the seconds of a kernel that writes rows into the memory of other ranks
    (DeepEP), besides latency and bytes: its messages are under way together, and so are both stages
    of an exchange that forwards rows. Without it, exchanges are collectives that send one message
    after the other."""

    name: str
    device: ClusterDevice
    levels: tuple[Level, ...]
    one_sided: Quantity | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a cluster needs at least one level of links")
        if any(level.bandwidth.value == 0 for level in self.levels):
            raise ValueError("a link's bandwidth must be above 0")
        if self.device.copy_bandwidth == 0:
            raise ValueError("the bandwidth of memory and of dispatch must be above 0")

    @property
    def devices(self) -> int:
        return self.span(len(self.levels) - 1)

    @property
    def node_size(self) -> int:
        return self.levels[0].joins

    @property
    def nodes(self) -> int:
        return self.devices // self.node_size

    def span(self, level: int) -> int:
        """The number of devices in a unit of this level."""
        return math.prod(entry.joins for entry in self.levels[: level + 1])

    def level_of(self, ranks: int) -> Level:
        """The lowest level that joins this many neighbouring devices. Raises UsageError."""
        span = 1
        for level in self.levels:
            span *= level.joins
            if span >= ranks:
                return level
        raise UsageError(f"{self.name} has {self.devices} devices, not {ranks}")

    def flops(self, dtype: str) -> Quantity:
        if dtype not in self.device.flops:
            dtypes = ", ".join(self.device.flops)
            raise UsageError(
                f"{self.name}: {self.device.name} has no FLOP/s for {dtype}, only for: {dtypes}"
            )
        return self.device.flops[dtype]

    def quantities(self) -> list[tuple[str, Quantity]]:
        """Every number of the file by name."""
        device = self.device
        rows = [
            ("memory of a device, bytes", device.memory),
            ("memory kept for libraries, bytes", device.reserved),
            ("memory bandwidth, bytes/s", device.memory_bandwidth),
            *((f"{dtype} FLOP/s", value) for dtype, value in device.flops.items()),
            ("efficiency of kernels", device.efficiency),
        ]
        if device.dispatch_bandwidth:
            rows.append(("bandwidth of dispatch, bytes/s", device.dispatch_bandwidth))
        if self.one_sided:
            rows.append(("one-sided exchange besides latency and bytes, s", self.one_sided))
        for level in self.levels:
            rows.append((f"{level.name} latency, s", level.latency))
            rows.append((f"{level.name} bandwidth of a link, bytes/s", level.bandwidth))
            if level.call:
                rows.append((f"{level.name} call of a collective, s", level.call))
        return rows


def read_cluster(source: str) -> Cluster:
    """A preset by name, or a YAML file. Raises UsageError."""
    return read_preset_or_file(source, Cluster, "clusters")


def with_nodes(cluster: Cluster, nodes: int) -> Cluster:
    """The same cluster with another number of nodes, all joined by the links of level 1. Raises
    UsageError where there are no such links."""
    inside, name = cluster.levels[0], f"{cluster.name}; resized to {nodes} nodes"
    if nodes == 1:
        return replace(cluster, name=name, levels=(inside,))
    if len(cluster.levels) == 1:
        raise UsageError(f"{cluster.name} has no links between nodes")
    across = replace(cluster.levels[1], joins=nodes)
    return replace(cluster, name=name, levels=(inside, across))
