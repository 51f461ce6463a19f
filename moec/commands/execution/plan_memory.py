"""`moec plan ARTIFACT --memory`: slots, hits and tokens a second for limits of memory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.commands.output.echo import echo
from moec.errors import SetupError

if TYPE_CHECKING:
    from moec.plan.simulation.slots_by_trace import Residency, Speeds
    from moec.report.data import Block
    from moec.runtime.artifact.artifact import Artifact

CONTEXT = 256
"""Keys that a token reads."""


def plan_memory(path: Path, limits: str, trace: Path | None, as_json: bool) -> None:
    """Prints what is expected of a model within each of the limits, 2GiB,4GiB.

    Raises UsageError for what is no size or an artifact without a store, and ArtifactError for what
    is none.
    """
    from moec.report.units import size
    from moec.runtime.process.byte_sizes import bytes_of

    sizes = [bytes_of(limit) for limit in limits.split(",")]
    speeds, rows = _expected(path, sizes, trace)
    if as_json:
        rows_in_json = [asdict(row) for row in rows]
        click.echo(json.dumps({"speeds": asdict(speeds), "limits": rows_in_json}, indent=1))
        return
    from moec.files.printable import columns

    read = {"direct": "past the page cache", "buffered": "through the page cache"}[speeds.reading]
    echo(
        f"{path}: experts are read at {size(speeds.disk)}/s {read} (measured); a token takes "
        f"{1e3 * speeds.token:.3g} ms with all weights in memory "
        f"({'measured' if speeds.measured else 'estimated by the speed of memory'}); "
        + (f"routing of {trace}" if trace else "uniform routing (assumed)")
    )
    lines = [("memory", "slots a layer", "policy", "hits", "read a token", "a token", "tokens/s")]
    for row in rows:
        least, most = min(row.slots), max(row.slots)
        slots = str(least) if least == most else f"{least} to {most}"
        hits = row.policy or "any", f"{row.hits:.0%}", size(row.read)
        times = f"{1e3 * row.seconds:.3g} ms", f"{1 / row.seconds:.3g}"
        lines.append((size(row.memory), slots, *hits, *times))
    echo("\n".join(line.rstrip() for line in columns(lines)))


def _expected(
    path: Path, limits: Sequence[int], trace: Path | None
) -> tuple[Speeds, list[Residency]]:
    from moec.plan.simulation.slots_by_trace import Speeds, expect
    from moec.report.data import ReportData
    from moec.runtime.artifact.artifact import read
    from moec.runtime.call.routing_trace import load_trace
    from moec.runtime.checks import free_memory
    from moec.runtime.expert_store.device import BUFFERED, DIRECT
    from moec.runtime.expert_store.read_speed import read_speed
    from moec.runtime.expert_store.start import (
        ONE_TEXT,
        expert_file,
        resident_limit,
        stored_sizes,
    )
    from moec.runtime.package import DECODE

    opened = read(path)
    if opened.package.gpu is not None:
        raise SetupError(f"--memory plans a model on a CPU, and {path} is for GPUs")
    layers = stored_sizes(opened)
    budgets = [resident_limit(opened, limit, ONE_TEXT) for limit in limits]  # before torch is here
    routing = None if trace is None else load_trace(trace)
    if DECODE not in opened.package.functions:
        raise SetupError(f"--memory plans the generation of text, and {path} generates none")
    report = ReportData.of_dict(opened.manifest.extra["report"])
    store = opened.package.store
    assert store is not None
    top_k = [_top_k(stacks[0].layer, report.blocks) for stacks in store.layers]
    experts = sum(layer.experts * layer.expert_bytes for layer in layers)
    reading = BUFFERED if 2 * experts < free_memory() else DIRECT
    piece = max(layer.expert_bytes // len(s) for layer, s in zip(layers, store.layers, strict=True))
    disk = read_speed(expert_file(opened), reading, piece)
    measured = experts + budgets[0].resident < free_memory() / 2
    token = _measured_token(opened) if measured else _estimated_token(opened, path)
    speeds = Speeds(disk, reading, token, measured)
    return speeds, [expect(b, layers, top_k, speeds, routing) for b in budgets]


def _measured_token(opened: Artifact) -> float:
    """Seconds, the median."""
    from moec.inspect.bench.contenders import compiled
    from moec.inspect.bench.race import Load, race
    from moec.runtime.call.executor import start

    generation = opened.package.generation
    assert generation is not None
    load = Load(1, min(32, (generation.longest or 64) // 2), 16, generation.vocabulary)
    (times,) = race([compiled(start(opened))], load, rounds=5)
    return statistics.median(times.decode)


def _estimated_token(opened: Artifact, path: Path) -> float:
    """Seconds, for the bytes that a token reads at the speed of memory."""
    from moec.model.stored import stored_graph
    from moec.report.profile.cost import cost
    from moec.report.profile.limits import bandwidth
    from moec.runtime.package import DECODE

    graph = stored_graph(path, DECODE, opened.graphs[DECODE])
    return cost(graph, {"B": 1, "S": 1, "Q": 1, "L": CONTEXT}, CONTEXT).bytes / bandwidth()


def _top_k(layer: str, blocks: Sequence[Block]) -> int:
    """That of the block that the layer of a store is in."""
    inside = [b for b in blocks if layer == b.name or layer.startswith(f"{b.name}.")]
    return max(inside or blocks, key=lambda block: len(block.name)).top_k
