"""Measures this machine's numbers for the planner, with all ranks working at once.

A device is one rank with its threads; ranks share cores and memory here as in a run. FLOP/s are
those of a compiled layer of experts, including its dispatch and sum; latency is that of the
exchanges of a layer, see `_exchanges`. FLOP/s and bytes/s are achieved ones, so the efficiency is
1.
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

from moec.ir.graph import Program
from moec.ir.text import parse
from moec.parallel.compile import compile_ranks
from moec.parallel.launch import start
from moec.parallel.process import Job, started
from moec.parallel.segments import RankModel
from moec.plan.cluster import Cluster, Device, Level
from moec.plan.files import Quantity
from moec.runtime.package import MAIN
from moec.target import cpu

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
E, D, H, T = 4, 256, 512, 1024  # experts, width, hidden width, tokens of each expert
FLOP = 2 * T * 3 * D * H
LAYER = f"""
graph main(x: DTYPE[T, {D}], i: i64[T, 1]; w1: DTYPE[{E}, {H}, {D}], w3: DTYPE[{E}, {H}, {D}],
           w2: DTYPE[{E}, {D}, {H}]) {{
  size T in [0, inf]
  rows: DTYPE[T, {D}], order: i32[T], ends: i32[{E}] = moe.dispatch(x, i) <num_experts={E}>
  out: DTYPE[T, {D}] = moe.experts(rows, ends, w1, w3, w2) {{
    graph expert(r: DTYPE[N, {D}]; v1: DTYPE[{H}, {D}], v3: DTYPE[{H}, {D}],
                 v2: DTYPE[{D}, {H}]) {{
      a: DTYPE[N, {H}] = aten.linear.default(r, v1)
      g: DTYPE[N, {H}] = aten.silu.default(a)
      u: DTYPE[N, {H}] = aten.linear.default(r, v3)
      h: DTYPE[N, {H}] = aten.mul.Tensor(g, u)
      y: DTYPE[N, {D}] = aten.linear.default(h, v2)
      return y
    }}
  }}
  y: DTYPE[T, {D}] = moe.combine(out, order) <k=1, tokens={{T}}, dtype=DTYPE>
  return y
}}"""
COPIED = 64 << 20  # bytes, larger than any cache
SENT = 4 << 20  # bytes from each rank to all ranks
REPEATS = 7


@dataclass(frozen=True)
class Numbers:
    """Medians on one rank: FLOP/s by dtype, bytes/s of memory and of an exchange, and seconds of
    the smallest exchange; and the bytes that the process takes."""

    flops: dict[str, float]
    memory_bandwidth: float
    latency: float
    bandwidth: float
    reserved: float


def measure(ranks: int, threads: int, timeout: float) -> Cluster:
    """A cluster of one node with `ranks` devices of `threads` threads each. All numbers are
    measured, except the memory of a device, which is its share. Raises RankError."""
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
        flops = {dtype: FLOP / _seconds(_layer(dtype)) for dtype in DTYPES}
        source = torch.ones(COPIED // 4)
        target = torch.empty_like(source)
        copied = 2 * COPIED / _seconds(lambda: target.copy_(source))
        least = _seconds(_exchange(world, world))
        latency = _seconds(_exchanges(world)) / 2 / max(1, world - 1)  # in one direction
        seconds = _seconds(_exchange(world, SENT // 4 // world * world))
        away = SENT * (world - 1) / world  # what stays on the rank is not sent
        bandwidth = away / max(seconds - least, 1e-9)
        reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Numbers(flops, copied, latency, bandwidth, reserved)


def _layer(dtype: str) -> Callable[[], object]:
    """A compiled layer of experts with equal numbers of rows."""
    graph = parse(LAYER.replace("DTYPE", dtype))
    weights = {
        param.name: torch.full([int(dim) for dim in param.shape], 0.01, dtype=DTYPES[dtype])
        for param in graph.params
    }
    (code,) = compile_ranks([Program(graph, weights)], MAIN, cpu.host())
    model = RankModel(code)
    inputs = [torch.full((T, D), 0.5, dtype=DTYPES[dtype]), torch.arange(T)[:, None] % E]
    return lambda: model(inputs, {})


def _exchanges(world: int) -> Callable[[], object]:
    """The exchanges of a layer at the smallest size: counts, which are read, then rows and the
    slots of their experts, and the rows on the way back."""
    counts, arriving = (torch.ones(world, dtype=torch.int32) for _ in range(2))
    rows, slots = torch.ones(world, 1), torch.ones(world, dtype=torch.int64)
    result, result_slots = torch.empty_like(rows), torch.empty_like(slots)

    def run() -> None:
        dist.all_to_all_single(arriving, counts)
        send, receive = counts.tolist(), arriving.tolist()
        dist.all_to_all_single(result, rows, receive, send)
        dist.all_to_all_single(result_slots, slots, receive, send)
        dist.all_to_all_single(rows, result, send, receive)

    return run


def _exchange(world: int, count: int) -> Callable[[], object]:
    rows, result = torch.ones(count), torch.empty(count)
    return lambda: dist.all_to_all_single(result, rows)


def _seconds(run: Callable[[], object]) -> float:
    """The median of several runs, after one that is not counted."""
    run()
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
