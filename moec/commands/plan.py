"""`moec plan MODEL`: parallel degrees, placement and exchange for a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from numpy.typing import NDArray

from moec.commands.execution.plan_memory import plan_memory
from moec.commands.options.files import check_output
from moec.commands.options.options import OneOf, check_only, force_option, json_option
from moec.commands.output.echo import echo
from moec.errors import SetupError, UsageError
from moec.files.printable import printable_json
from moec.plan.plan import LayerPlan, Plan
from moec.plan.search.planner import Planner
from moec.plan.simulation.simulate import Ids, Traffic, drawn, of_trace, sample, traffic

if TYPE_CHECKING:
    from moec.plan.inputs.model import Model
    from moec.plan.inputs.workload import Phase, Workload
    from moec.plan.network.cluster import Cluster

OF_MEMORY = ("model", "memory", "trace", "as_json")
OUT = click.Path(path_type=Path, dir_okay=False)


@click.command("plan")
@click.argument("model")
@click.option(
    "--cluster", metavar="NAME|FILE", help="The cluster to plan for: a preset or a YAML file."
)
@click.option(
    "--nodes", type=click.IntRange(1), metavar="N",
    help="Plan for so many nodes of the cluster instead of all of them.",
)  # fmt: skip
@click.option(
    "--measure", type=OUT, metavar="FILE.yaml",
    help="Instead of --cluster: measure this machine with --nproc ranks, and write it as a "
    "cluster.",
)  # fmt: skip
@click.option(
    "--nproc", type=click.IntRange(min=2), default=2, show_default=True, metavar="N",
    help="Number of ranks for --measure.",
)  # fmt: skip
@click.option(
    "--trace",
    type=Path,
    metavar="FILE.npz",
    help="Recorded routing of the model; see moec run --record-routing.",
)
@click.option(
    "--routing", metavar="FORM", default="uniform", show_default=True,
    help="Assumed routing if there is no trace: uniform, zipf:EXPONENT[:SEED] or "
    "lognormal:SIGMA[:SEED].",
)  # fmt: skip
@click.option(
    "--groups", type=Path, metavar="FILE.yaml",
    help="Experts of each modality or task, which get ranks of their own: text: [0, 1].",
)  # fmt: skip
@click.option(
    "--phase", type=OneOf(["prefill", "decode", "training"]), default="decode",
    show_default=True,
)  # fmt: skip
@click.option(
    "--tokens",
    type=click.IntRange(1),
    help="Tokens in one step; default: 128 per device in decode, else 4096.",
)
@click.option(
    "--sequences",
    type=click.IntRange(0),
    help="Sequences in the KV cache; default: one for each token in decode, in prefill as many "
    "prompts as a step has tokens for.",
)
@click.option(
    "--context", type=click.IntRange(0), default=2048, show_default=True, metavar="TOKENS"
)
@click.option("--compute", default="bf16", show_default=True, help="The dtype of matrix products.")
@click.option(
    "--send", default="bf16", show_default=True, help="The dtype in which rows are sent to experts."
)
@click.option(
    "--latency",
    type=float,
    metavar="SECONDS",
    help="Report whether a step takes at most this time.",
)
@click.option(
    "--memory",
    metavar="SIZE,…",
    help="Instead of a cluster: hits and tokens a second of an artifact within these limits.",
)
@click.option(
    "--overlap", is_flag=True,
    help="Two micro-batches: rows of one travel during the products of the other.",
)  # fmt: skip
@click.option("--uniform", is_flag=True, help="Use the same parallel degrees in all layers.")
@click.option(
    "--spare", default="0,0.0625,0.125,0.25", show_default=True, metavar="SHARE,…",
    help="Numbers of extra expert slots to try for copies of hot experts, as shares of the "
    "experts.",
)  # fmt: skip
@click.option("-o", "--output", type=OUT, metavar="FILE.json", help="Write the plan.")
@click.option(
    "--placement",
    type=OUT,
    metavar="FILE.json",
    help="Write the placement as the expert map of vLLM and SGLang.",
)
@click.option("--picture", type=OUT, metavar="FILE", help="Loads of ranks and links: .png or .svg.")
@click.option(
    "--explain", type=click.IntRange(0), metavar="LAYER", help="Explain the choice for one layer."
)
@click.option(
    "--compare", "other", type=Path, metavar="PLAN.json", help="Compare with another plan."
)
@json_option
@force_option
def command(
    model: str,
    cluster: str | None,
    nodes: int | None,
    measure: Path | None,
    nproc: int,
    trace: Path | None,
    routing: str,
    groups: Path | None,
    phase: Phase,
    tokens: int | None,
    sequences: int | None,
    context: int,
    compute: str,
    send: str,
    latency: float | None,
    memory: str | None,
    overlap: bool,
    uniform: bool,
    spare: str,
    output: Path | None,
    placement: Path | None,
    picture: Path | None,
    explain: int | None,
    other: Path | None,
    as_json: bool,
    force: bool,
) -> None:
    """Choose the parallel degrees, the exchange and the placement of experts for a cluster.

    MODEL is a preset (an unknown name lists them), a YAML description, or a folder with a
    config.json. No weights are needed. With --memory it is an artifact: what to expect of it on
    this machine where a part of its experts is in memory, as with `moec run --memory`.
    """
    if memory is not None:
        check_only(OF_MEMORY, "is for a cluster, and --memory for this machine: leave one out")
        plan_memory(Path(model), memory, trace, as_json)
        return
    import msgspec

    from moec.plan.inputs.model import read_model
    from moec.plan.placement.bound_experts import read_groups
    from moec.plan.plan import physical_to_logical, read_plan, show, write_plan
    from moec.plan.report import text
    from moec.plan.report.heat_map import check_picture_name
    from moec.plan.search.planner import best_uniform

    for path in (output, placement, picture, measure):
        if path:
            check_output(path, str(path), force=force)
    if as_json and (explain is not None or other):
        raise UsageError("--json prints the plan alone: leave out --explain and --compare")
    if picture:
        check_picture_name(picture)
    compared = read_plan(other) if other else None
    bound = read_groups(groups) if groups else {}
    machine = cluster_of(cluster, nodes, measure, nproc)
    work = workload(machine, phase, tokens, sequences, context, compute, send, latency, overlap)
    planner = planner_of(read_model(model), machine, work, trace, routing, shares(spare), bound)
    plan = best_uniform(planner) if uniform else planner.best()
    if explain is not None and explain >= len(plan.layers):
        raise UsageError(f"--explain {explain}: the model has {len(plan.layers)} layers")
    against = text.compare(plan, compared, ("this plan", str(other))) if compared else ""
    table = physical_to_logical(plan) if placement else None
    if output:
        write_plan(plan, output)
    if placement and table is not None:
        export(table, placement)
    if picture:
        draw(plan, planner, picture)
    if as_json:
        click.echo(
            printable_json(msgspec.json.format(msgspec.json.encode(plan), indent=1).decode())
        )
        return
    if explain is not None:
        options = planner.candidates_of(explain)
        echo(text.explain(plan.layers[explain], options, plan.memory_limit), nl=False)
    else:
        echo(show(plan), nl=False)
    if against:
        click.echo()
        echo(against, nl=False)
    for path in (output, placement, picture, measure):
        if path:
            echo(f"wrote {path}")


def cluster_of(source: str | None, nodes: int | None, measured: Path | None, ranks: int) -> Cluster:
    """The named cluster, or this machine, measured. Raises UsageError and RankError."""
    if (source is None) == (measured is None):
        raise UsageError("give either --cluster NAME|FILE, or --measure FILE.yaml for this machine")
    if source is not None:
        from moec.plan.network.cluster import read_cluster, with_nodes

        return with_nodes(read_cluster(source), nodes) if nodes else read_cluster(source)
    if nodes:
        raise UsageError("--nodes is for a --cluster; --nproc is the number of ranks of --measure")
    from moec.parallel.measure import measure, write_cluster

    assert measured is not None
    machine = measure(ranks, threads=1, timeout=60.0)
    write_cluster(machine, measured)
    return machine


def shares(text: str) -> tuple[float, ...]:
    """The shares in the value of --spare. Raises UsageError."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    if any(not 0 <= value <= 16 for value in values):
        raise UsageError(f"--spare {text}: write shares such as 0,0.125")
    return values


def workload(
    cluster: Cluster,
    phase: Phase,
    tokens: int | None,
    sequences: int | None,
    context: int,
    compute: str,
    send: str,
    latency: float | None,
    overlap: bool,
) -> Workload:
    """The workload of the options. Raises UsageError for a dtype that cannot be sent, and for a
    latency that is no time."""
    from moec.plan.inputs.files import Quantity
    from moec.plan.inputs.workload import TOKENS, Workload

    tokens = tokens or TOKENS[phase] * cluster.devices
    if sequences is None:
        sequences = tokens if phase == "decode" else -(-tokens // max(1, context))
    if latency is not None and not 0 < latency < float("inf"):
        raise UsageError(f"--latency {latency}: write seconds above 0, such as 0.02")
    try:
        return Workload(
            tokens=tokens,
            sequences=sequences,
            context=context,
            phase=phase,
            compute=compute,
            send=send,
            latency=Quantity(latency, "assumed", "asked for") if latency else None,
            overlap=overlap,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def planner_of(
    model: Model,
    cluster: Cluster,
    work: Workload,
    trace: Path | None,
    routing: str,
    spare: tuple[float, ...],
    groups: Mapping[str, Sequence[int]],
) -> Planner:
    """The planner, with the loads of a trace or of a distribution. Raises UsageError."""
    from moec.plan.inputs.importers import read_routing
    from moec.plan.inputs.workload import normalised, of_distribution

    experts = [layer.experts for layer in model.each_layer]
    if trace is None:
        says = f"{routing} (assumed)"
        loads = of_distribution(routing, experts)
        return Planner(model, cluster, work, loads, says, spare, groups=groups)
    routing_of = read_routing(trace)
    sparse = [count for count in experts if count]
    recorded = [len(count) for count in routing_of.counts]
    if len(recorded) != len(sparse) or any(a > b for a, b in zip(recorded, sparse, strict=True)):
        raise SetupError(
            f"{trace} is of another model: it has {_layers(recorded)}, {model.name} has "
            f"{_layers(sparse)}"
        )
    counts = iter(routing_of.counts)
    loads = tuple(normalised(padded(next(counts), e) if e else np.empty(0)) for e in experts)
    says = f"{trace}, {routing_of.rows} choices (measured)"
    return Planner(model, cluster, work, loads, says, spare, routing_of.trace, groups)


def _layers(experts: Sequence[int]) -> str:
    """ "2 MoE layers, of 8 and 16 experts" for [8, 16]."""
    from moec.report.units import counted

    numbers = " and ".join(str(count) for count in sorted(set(experts)))
    return counted(len(experts), "MoE layer") + (f", of {numbers} experts" if experts else "")


def padded(counts: NDArray[np.float64], experts: int) -> NDArray[np.float64]:
    """Counts of all experts, with zeros for the last ones, which were never chosen."""
    return np.pad(counts, (0, experts - len(counts)))


def draw(plan: Plan, planner: Planner, path: Path) -> None:
    """Draw the predicted load of every rank of an expert group, and the load of every link, one row
    per layer."""
    from moec.plan.placement.placement import rank_loads
    from moec.plan.report.heat_map import Table, save_heat_map

    layers = [layer for layer in plan.layers if layer.experts]
    loads = [rank_loads(planner.loads[layer.layer], layer.slots) for layer in layers]
    where = f"{plan.model} on {plan.cluster}"
    unit = "node" if plan.devices > plan.node_size else "device"
    save_heat_map(
        path,
        Table(loads, f"Load of ranks, {where}", "MoE layer", "rank"),
        Table(link_loads(plan, planner), f"Load of links, {where}", "MoE layer", unit),
    )


def export(table: NDArray[np.int64], path: Path) -> None:
    """Write the map [L, P] that vLLM and SGLang read."""
    path.write_text(json.dumps({"physical_to_logical_map": table.tolist()}) + "\n")


DRAWN = 16_384
"""Tokens that are drawn where there is no trace."""


def link_loads(plan: Plan, planner: Planner) -> list[NDArray[np.float64]]:
    """The rows on the busier direction of each link, by MoE layer: [nodes], or [devices] where all
    devices are on one node. Rows are those of the trace, or else drawn by the loads."""
    layers = [layer for layer in plan.layers if layer.experts]
    return [
        _loads(traffic(ids, layer, plan.devices, plan.node_size), plan)
        for layer, ids in zip(layers, _choices(layers, planner), strict=True)
    ]


def _choices(layers: Iterable[LayerPlan], planner: Planner) -> Iterable[Ids]:
    if planner.trace is not None:
        return of_trace(sample(planner.trace))
    numbers = [layer.layer for layer in layers]
    loads = [planner.loads[number] for number in numbers]
    return drawn(loads, [planner.cost.layers[number].k for number in numbers], DRAWN)


def _loads(counts: Traffic, plan: Plan) -> NDArray[np.float64]:
    nodes = plan.devices // plan.node_size
    if nodes == 1:
        sent, received = counts.sent_inside, counts.got_inside
    else:
        ways = (counts.sent_across, counts.got_across)
        sent, received = (way.reshape(nodes, -1).sum(1) for way in ways)
    loads: NDArray[np.float64] = np.maximum(sent, received).astype(float)
    return loads
