"""This machine's numbers for the planner, measured by ranks that are all at work at once.

A device is one rank with its threads: cores and memory that ranks share are shared here too. FLOP/s
and bytes/s are achieved ones, and the efficiency beside them is 1.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from moec.parallel.launch import start
from moec.parallel.process import Job, started
from moec.plan.cluster import Cluster, Device, Level
from moec.plan.files import Quantity

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SIDE = 512  # of the matrices that are multiplied
COPIED = 64 << 20  # bytes, beyond any cache
SENT = 4 << 20  # bytes from each rank to all
REPEATS = 7


@dataclass(frozen=True)
class Numbers:
    """Medians on one rank: FLOP/s by dtype, bytes/s of memory and of an exchange, and seconds of
    the smallest exchange; bytes that the process takes."""

    flops: dict[str, float]
    memory_bandwidth: float
    latency: float
    bandwidth: float
    reserved: float


def measure(ranks: int, threads: int, timeout: float) -> Cluster:
    """A cluster of one node with `ranks` devices of `threads` threads each, all numbers measured
    but the memory of a device, which is its share. Raises RankError."""
    job = Job(Path(), None, None, timeout, threads)
    numbers = start(job, ranks, measure_rank)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    note = f"{ranks} ranks at once, {threads} thread{'s' if threads > 1 else ''} each"

    def quantity(value: float, of: str = note) -> Quantity:
        return Quantity(float(f"{value:.4g}"), "measured", of)

    device = Device(
        name=f"a rank of {threads} thread{'s' if threads > 1 else ''}",
        memory=quantity(total / ranks, "an equal share of this machine's"),
        reserved=quantity(numbers.reserved, "a process before it has a model"),
        memory_bandwidth=quantity(numbers.memory_bandwidth),
        flops={dtype: quantity(value) for dtype, value in numbers.flops.items()},
        efficiency=quantity(1.0, "FLOP/s and bytes/s are achieved ones"),
    )
    level = Level(
        name="gloo",
        joins=ranks,
        latency=quantity(numbers.latency),
        bandwidth=quantity(numbers.bandwidth),
    )
    return Cluster(name=f"this machine, {note}", device=device, levels=(level,))


def write_cluster(cluster: Cluster, path: Path) -> None:
    path.write_bytes(msgspec.yaml.encode(cluster))


def measure_rank(job: Job) -> Numbers:
    """One rank's numbers; all ranks run each part at the same time."""
    with started(job) as (_, world):
        flops = {dtype: 2 * SIDE**3 / _seconds(_product(kind)) for dtype, kind in DTYPES.items()}
        source = torch.ones(COPIED // 4)
        target = torch.empty_like(source)
        copied = 2 * COPIED / _seconds(lambda: target.copy_(source))
        latency = _seconds(_exchange(world, world)) / max(1, world - 1)
        seconds = _seconds(_exchange(world, SENT // 4 // world * world))
        away = SENT * (world - 1) / world  # what stays on the rank is not sent
        bandwidth = away / max(seconds - latency * (world - 1), 1e-9)
        reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Numbers(flops, copied, latency, bandwidth, reserved)


def _product(dtype: torch.dtype) -> Callable[[], object]:
    x = torch.full((SIDE, SIDE), 0.5, dtype=dtype)
    return lambda: x @ x


def _exchange(world: int, count: int) -> Callable[[], object]:
    rows, result = torch.ones(count), torch.empty(count)
    return lambda: dist.all_to_all_single(result, rows)


def _seconds(run: Callable[[], object]) -> float:
    """The median of some runs after one that is not counted."""
    run()
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
