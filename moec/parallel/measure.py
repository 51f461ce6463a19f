"""Measures this machine's numbers for the planner, with all ranks working at once.

A device is one rank with its threads; ranks share cores and memory here as in a run. A time is that
of the slowest rank. FLOP/s are those of a compiled layer of experts, including its dispatch and
sum, between exchanges: after a wait, a core starts slowly. FLOP/s and bytes/s are achieved ones, so
the efficiency is 1.
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
from moec.parallel.compile import compile_function
from moec.parallel.launch import start
from moec.parallel.process import Job, started
from moec.parallel.segments import RankModel
from moec.plan.inputs.files import Quantity
from moec.plan.network.cluster import Cluster, ClusterDevice, Level
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
K = 2  # experts of a token
ROUTING = f"""
graph main(x: f32[T, {D}]; router: f32[{E}, {D}]) {{
  size T in [0, inf]
  logits: f32[T, {E}] = aten.linear.default(x, router)
  w: f32[T, {K}], i: i64[T, {K}] = moe.route(logits) <k={K}>
  rows: f32[{K}*T, {D}], order: i32[{K}*T], ends: i32[{E}] =
    moe.dispatch(x, i) <num_experts={E}>
  y: f32[T, {D}] = moe.combine(rows, order, w) <k={K}, tokens={{T}}, dtype=f32, weighted=true>
  return y
}}"""
ROUTED = 2 * T * K * D * 4  # bytes of the rows, sorted and summed
COPIED = 64 << 20  # bytes, larger than any cache
SENT = 4 << 20  # bytes from each rank to all ranks
CALLS = 4  # small exchanges of a step: counts, rows and slots before the layer, rows after it
REPEATS = 15


@dataclass(frozen=True)
class Numbers:
    """FLOP/s by dtype; bytes/s of memory, of dispatch and of an exchange; seconds of a message, and
    of a collective besides its messages; the bytes that a process takes."""

    flops: dict[str, float]
    memory_bandwidth: float
    dispatch_bandwidth: float
    latency: float
    call: float
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

    device = ClusterDevice(
        name=f"a rank of {threads} thread{'s' if threads > 1 else ''}",
        memory=quantity(total / ranks, "an equal share of this machine's"),
        reserved=quantity(numbers.reserved, "a process before it has a model"),
        memory_bandwidth=quantity(numbers.memory_bandwidth),
        flops={dtype: quantity(value) for dtype, value in numbers.flops.items()},
        efficiency=quantity(1.0, "FLOP/s and bytes/s are achieved ones"),
        dispatch_bandwidth=quantity(numbers.dispatch_bandwidth),
    )
    level = Level(
        name="gloo",
        joins=ranks,
        latency=quantity(numbers.latency),
        bandwidth=quantity(numbers.bandwidth),
        call=quantity(numbers.call),
    )
    return Cluster(name=f"this machine, {note}", device=device, levels=(level,))


def write_cluster(cluster: Cluster, path: Path) -> None:
    path.write_bytes(msgspec.yaml.encode(cluster))


def measure_rank(job: Job) -> Numbers:
    """One rank's numbers; all ranks run each part at the same time."""
    with started(job) as (rank, world, _):
        exchange = _exchange(world, world)
        flops, calls = {}, []
        for dtype in DTYPES:
            layer, rest = _step_seconds(_layer(dtype), exchange)
            flops[dtype] = FLOP / layer
            calls.append(rest / CALLS)
        smallest = statistics.median(calls)
        dispatched = ROUTED / _seconds(_routing())
        source = torch.ones(COPIED // 4)
        target = torch.empty_like(source)
        copied = 2 * COPIED / _seconds(lambda: target.copy_(source))
        latency = _seconds(_message(rank, world)) / 2
        call = max(smallest - (world - 1) * latency, 1e-9)
        seconds = _seconds(_exchange(world, SENT // 4 // world * world))
        away = SENT * (world - 1) / world  # what stays on the rank is not sent
        bandwidth = away / max(seconds - smallest, seconds / 2)
        reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Numbers(flops, copied, dispatched, latency, call, bandwidth, reserved)


def _layer(dtype: str) -> Callable[[], object]:
    """A compiled layer of experts with equal numbers of rows."""
    inputs = [torch.full((T, D), 0.5, dtype=DTYPES[dtype]), torch.arange(T)[:, None] % E]
    return _compiled(LAYER.replace("DTYPE", dtype), DTYPES[dtype], inputs)


def _routing() -> Callable[[], object]:
    """A compiled router, dispatch and combine, without experts."""
    generator = torch.Generator().manual_seed(0)
    return _compiled(ROUTING, torch.float32, [torch.randn(T, D, generator=generator)])


def _compiled(text: str, dtype: torch.dtype, inputs: list[torch.Tensor]) -> Callable[[], object]:
    graph, generator = parse(text), torch.Generator().manual_seed(0)
    weights = {
        param.name: torch.rand([int(dim) for dim in param.shape], generator=generator).to(dtype)
        for param in graph.params
    }
    (code,) = compile_function([Program(graph, weights)], MAIN, cpu.host())
    model = RankModel(code)
    return lambda: model(inputs, {})


def _message(rank: int, world: int) -> Callable[[], object]:
    """The smallest message from rank 0 to rank 1 and back; nothing on the other ranks."""
    tensor = torch.ones(1)

    def run() -> None:
        if rank < 2 <= world:
            first, second = (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send)
            first(tensor, 1 - rank)
            second(tensor, 1 - rank)

    return run


def _exchange(world: int, count: int) -> Callable[[], object]:
    """Equal parts of `count` numbers to all ranks."""
    rows, result = torch.ones(count), torch.empty(count)
    return lambda: dist.all_to_all_single(result, rows)


def _seconds(run: Callable[[], object]) -> float:
    """The median of several runs on the slowest rank, after one that is not counted."""
    (seconds,) = _slowest(lambda: [_time(run)])
    return seconds


def _step_seconds(
    layer: Callable[[], object], exchange: Callable[[], object]
) -> tuple[float, float]:
    """The seconds of a layer between the smallest exchanges of a step, and of these exchanges,
    including the wait for the last rank."""

    def step() -> list[float]:
        before = sum(_time(exchange) for _ in range(CALLS - 1))
        inside = _time(layer)
        return [inside, before + inside + _time(exchange)]

    inside, total = _slowest(step)
    return inside, max(total - inside, 1e-9)


def _slowest(run: Callable[[], list[float]]) -> list[float]:
    """Each of the seconds that a run returns: the median of several runs on the slowest rank."""
    run()
    rows = []
    for _ in range(REPEATS):
        dist.barrier()
        rows.append(run())
    slowest = torch.tensor(rows, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return list(slowest.median(0).values.tolist())


def _time(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
