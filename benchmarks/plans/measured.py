"""Predictions of the cost model and measured steps, on 2 or 4 ranks of this machine.

    python -m benchmarks.plans.measured --ranks 2

The machine is measured first (`moec plan --measure`), then one MoE layer in float32 runs in each
form of exchange. Predictions are for even routing. Four ranks are
two nodes of two. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from moec.ir.graph import Program
from moec.ir.text import parse
from moec.parallel.build import save_ranks
from moec.parallel.launch import launch
from moec.parallel.measure import measure
from moec.parallel.process import Job, joined
from moec.parallel.process_ranks import ProcessRanks, named_meanings
from moec.parallel.segments import RankModel
from moec.parallel.store import load_rank
from moec.passes.parallel.plan_parallelism import rank_programs
from moec.plan.groups import groups_of
from moec.plan.inputs.model import Layers, Model
from moec.plan.inputs.workload import Workload, of_distribution
from moec.plan.network.cluster import Cluster
from moec.plan.network.degrees import Degrees
from moec.plan.search.planner import Planner

E, D, H, K, T = 8, 256, 512, 2, 512  # experts, widths, per token, tokens per rank
STEPS = 9
FORMS = {
    2: (
        Degrees(1, 2, 1, 8, "flat"),
        Degrees(1, 2, 1, 10, "flat"),
        Degrees(1, 1, 2, 8, "coordinated"),
    ),
    4: (
        Degrees(1, 4, 1, 8, "flat"),
        Degrees(1, 2, 1, 8, "flat"),
        Degrees(1, 4, 1, 8, "hierarchical"),
        Degrees(1, 4, 1, 8, "rail"),
        Degrees(1, 4, 1, 8, "deduplicated"),
        Degrees(1, 2, 2, 8, "coordinated"),
    ),
}
GRAPH = f"""
graph main(x: f32[T, {D}]; router: f32[{E}, {D}], w1: f32[{E}, {H}, {D}], w3: f32[{E}, {H}, {D}],
           w2: f32[{E}, {D}, {H}]) {{
  size T in [0, inf]
  logits: f32[T, {E}] = aten.linear.default(x, router)
  w: f32[T, {K}], i: i64[T, {K}] = moe.route(logits) <k={K}>
  rows: f32[{K}*T, {D}], order: i32[{K}*T], ends: i32[{E}] =
    moe.dispatch(x, i) <num_experts={E}> @ mlp
  out: f32[{K}*T, {D}] = moe.experts(rows, ends, w1, w3, w2) @ mlp.experts {{
    graph expert(r: f32[N, {D}]; v1: f32[{H}, {D}], v3: f32[{H}, {D}], v2: f32[{D}, {H}]) {{
      a: f32[N, {H}] = aten.linear.default(r, v1)
      g: f32[N, {H}] = aten.silu.default(a)
      u: f32[N, {H}] = aten.linear.default(r, v3)
      h: f32[N, {H}] = aten.mul.Tensor(g, u)
      y: f32[N, {D}] = aten.linear.default(h, v2)
      return y
    }}
  }}
  z: f32[T, {D}] = moe.combine(out, order, w) <k={K}, tokens={{T}}, dtype=f32, weighted=true> @ mlp
  return z
}}"""


def step_seconds(job: Job) -> dict[str, float]:
    """The median step of every plan in the job's folder."""
    results = {}
    with joined(job) as (ranks, _):
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(ranks.rank))
        for folder in sorted(job.folder.parent.glob("*.ranks")):
            files = load_rank(folder, ranks.rank)
            groups, patience = groups_of(files.plan), timedelta(0, job.timeout)
            meanings = named_meanings(ProcessRanks(ranks.rank, groups, patience))
            model, seconds = RankModel(files.code), []
            for _step in range(STEPS):
                dist.barrier()
                start = time.perf_counter()
                model([x], meanings)
                seconds.append(time.perf_counter() - start)
            results[folder.stem] = statistics.median(seconds[2:])
    return results


def in_nodes(cluster: Cluster) -> Cluster:
    """Four ranks as two nodes of two, over the same links."""
    (level,) = cluster.levels
    if level.joins == 2:
        return cluster
    inside, across = (msgspec.structs.replace(level, name=n, joins=2) for n in ("node", "rail"))
    return msgspec.structs.replace(cluster, levels=(inside, across))


def told(degrees: Degrees) -> str:
    return f"EP {degrees.experts}, {degrees.slices} slices, {degrees.slots} slots, {degrees.form}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, choices=sorted(FORMS), default=2)
    ranks = parser.parse_args().ranks
    forms = FORMS[ranks]
    generator = torch.Generator().manual_seed(0)
    graph = parse(GRAPH)
    weights = {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) / 16  # type: ignore[arg-type]
        for p in graph.params
    }
    layer = Layers(experts=E, k=K, hidden=H)
    model = Model(name="one MoE layer", width=D, weights="f32", layers=(layer,))
    print("| ranks | plan | predicted | of which exchange | measured | predicted/measured |")
    print("|---|---|---|---|---|---|")
    cluster = in_nodes(measure(ranks, threads=1, timeout=300.0))
    work = Workload(tokens=T * ranks, sequences=0, context=0, compute="f32", send="f32", back="f32")
    loads = of_distribution("uniform", [E])
    planner = Planner(model, cluster, work, loads, "uniform", (0.0,))
    with tempfile.TemporaryDirectory() as folder:
        plans = {str(n): planner.plan([d], 0.0) for n, d in enumerate(forms)}
        for name, plan in plans.items():
            module = rank_programs(Program(graph, weights), plan)
            save_ranks(module, plan, Path(folder, f"{name}.ranks"))
        job = Job(Path(folder, "0.ranks"), None, None, 300.0, 1)
        measured = launch(job, ranks, step_seconds)
    for name, (plan, degrees) in zip(plans, zip(plans.values(), forms, strict=True), strict=True):
        parts = plan.layers[0].seconds
        exchange = parts["exchange out"] + parts["exchange back"]
        predicted, right = exchange + parts["routing"] + parts["experts"], measured[name]
        print(
            f"| {ranks} | {told(degrees)} | {predicted * 1e3:.2f} ms | {exchange * 1e3:.2f} ms | "
            f"{right * 1e3:.2f} ms | {predicted / right:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
