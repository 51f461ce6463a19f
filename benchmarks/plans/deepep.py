"""The planner's exchanges beside published times of DeepEP (deepep.yaml), on the preset h800-40.

    python -m benchmarks.plans.deepep
    python -m benchmarks.plans.deepep --fit

Rows are those that DeepEP sends: to each expert in its low-latency kernels (a flat exchange), and
once to each rank in the normal ones, along one rail to each node (a deduplicated exchange). `--fit`
searches the three parameters with the least sum of squared logarithms of the errors.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moec.plan.inputs.files import Quantity
from moec.plan.inputs.model import Layers
from moec.plan.network.cluster import Cluster, read_cluster
from moec.plan.network.exchange import (
    Exchange,
    deduplicated,
    distinct_nodes,
    even_away,
    flat,
    seconds,
)

WIDTH, EXPERTS, K, NODE = 7168, 256, 8, 8
BYTES = {"out": WIDTH * (1 + 4 / 128), "back": WIDTH * 2.0}
TOKENS = {"low_latency": 128, "normal": 4096, "v2": 8192}
NODES_OF_TOKEN = 4


@dataclass(frozen=True)
class Figure:
    """A published time, and the exchange that takes it."""

    kernel: str
    ranks: int
    way: str
    seconds: float
    step: Exchange

    def predicted(self, cluster: Cluster) -> float:
        return seconds(self.step, cluster, self.ranks)

    def error(self, cluster: Cluster) -> float:
        return self.predicted(cluster) / self.seconds - 1


def figures() -> tuple[list[Figure], list[Figure]]:
    """The published times that the parameters fit, and others."""
    file = msgspec.yaml.decode(Path(__file__).with_name("deepep.yaml").read_bytes())
    fitted = [*_low_latency(file["low_latency"]), *_normal("normal", file["normal"])]
    return fitted, list(_normal("v2", file["v2"]))


def _low_latency(table: dict[int, dict[str, float]]) -> Iterator[Figure]:
    for ranks, row in table.items():
        for way, micro in row.items():
            step = flat(ranks, NODE, TOKENS["low_latency"] * K * BYTES[way])
            yield Figure("low_latency", ranks, way, micro * 1e-6, step)


def _normal(kernel: str, table: dict[int, dict[str, float]]) -> Iterator[Figure]:
    for ranks, row in table.items():
        nodes = ranks // NODE
        few = min(NODES_OF_TOKEN, nodes)
        layer = Layers(experts=EXPERTS, k=K, groups=nodes, k_groups=few)
        share = nodes // few
        of_token = distinct_nodes(EXPERTS // share, K, ranks // share)  # ranks
        for way, rate in row.items():
            size = TOKENS[kernel] * BYTES[way]
            if nodes == 1:
                step, counted = flat(ranks, NODE, size * of_token), of_token
            else:
                away = even_away(layer, nodes) * K
                counted = away * nodes / (nodes - 1)
                step = deduplicated(ranks, NODE, size * of_token, away / of_token)
            yield Figure(kernel, ranks, way, size * counted / (rate * 1e9), step)


def with_parameters(cluster: Cluster, kernel: float, near: float, far: float) -> Cluster:
    """The cluster with other seconds of an exchange and bytes/s of NVLink and NICs."""
    replace, fitted = msgspec.structs.replace, "measured"
    levels = [
        replace(level, bandwidth=Quantity(rate, fitted))  # type: ignore[arg-type]
        for level, rate in zip(cluster.levels, (near, far), strict=True)
    ]
    return replace(cluster, levels=tuple(levels), one_sided=Quantity(kernel, fitted))  # type: ignore[arg-type]


def fit(cluster: Cluster, points: Sequence[Figure]) -> Cluster:
    """The cluster with the parameters of least error."""
    from scipy.optimize import minimize

    def loss(logarithms: Sequence[float]) -> float:
        other = with_parameters(cluster, *map(math.exp, logarithms))
        return sum(math.log(1 + point.error(other)) ** 2 for point in points)

    start = [math.log(value) for value in (20e-6, 150e9, 45e9)]
    return with_parameters(cluster, *map(math.exp, minimize(loss, start, method="Nelder-Mead").x))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fit", action="store_true")
    (points, others), cluster = figures(), read_cluster("h800-40")
    if parser.parse_args().fit:
        cluster = fit(cluster, points)
        near, far = (level.bandwidth.value / 1e9 for level in cluster.levels)
        assert cluster.one_sided is not None
        kernel = cluster.one_sided.value
        print(f"{kernel * 1e6:.1f} us an exchange, {near:.1f} GB/s NVLink, {far:.1f} GB/s a NIC")
    print("| kernels | EP | way | published | predicted | error |")
    print("|---|---|---|---|---|---|")
    for point in (*points, *others):
        print(
            f"| {point.kernel} | {point.ranks} | {point.way} | {point.seconds * 1e6:.0f} us | "
            f"{point.predicted(cluster) * 1e6:.0f} us | {point.error(cluster):+.1%} |"
        )


if __name__ == "__main__":
    main()
