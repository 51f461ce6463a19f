"""`moec routing FILE`: statistics of recorded routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.commands.options.files import check_output
from moec.commands.options.options import force_option, json_option
from moec.commands.output.echo import echo
from moec.errors import SetupError, UsageError

if TYPE_CHECKING:
    from moec.plan.inputs.importers import ImportedRouting

OUT = click.Path(path_type=Path, dir_okay=False)


@click.command("routing")
@click.argument("source", type=Path, metavar="FILE")
@click.option(
    "--picture", type=OUT, metavar="FILE",
    help="Heat-map of loads: .png or .svg.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=OUT, metavar="FILE.npz", help="Write the routing as a trace of moec."
)
@click.option(
    "--cache", is_flag=True,
    help="Replay the trace with a part of the experts in memory, as moec run --memory has, by "
    "several policies.",
)  # fmt: skip
@json_option
@force_option
def command(
    source: Path,
    picture: Path | None,
    output: Path | None,
    cache: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Show the load of experts by layer: balance, unused experts, drift and co-activation.

    FILE is a trace of moec (.npz), counts per layer and expert (.npy, .json), one record per line
    (.jsonl), or a dump of SGLang's recorder (.pt).
    """
    from moec.plan.inputs.importers import read_routing
    from moec.plan.placement.balance import balance
    from moec.plan.report.heat_map import Table, check_picture_name, save_heat_map
    from moec.runtime.call.routing_trace import save_trace

    for path in (picture, output):
        if path:
            check_output(path, str(path), force=force)
    if picture:
        if cache:
            raise UsageError("--picture draws the loads of experts: leave it or --cache out")
        check_picture_name(picture)
    if output and output.suffix != ".npz":
        raise UsageError(f"-o {output}: the name of a trace ends in .npz")
    routing = read_routing(source)
    if output:
        if routing.trace is None:
            raise SetupError(f"{source} has counts only; a trace needs the experts of each token")
        save_trace(routing.trace, output)
    if cache:
        _show_cache(source, routing, as_json=as_json)
        return
    layers = balance(routing)
    if picture:
        title = f"Load of experts, {source.name}"
        save_heat_map(picture, Table(routing.counts, title, "layer", "expert"))
    if as_json:
        click.echo(json.dumps([layer.to_dict() for layer in layers], indent=1))
        return
    from moec.files.printable import columns
    from moec.report.units import counted

    tokens = f"{counted(routing.trace.tokens, 'token')}, " if routing.trace else "counts only, "
    counts = f"{counted(routing.rows, 'choice')}, {counted(len(layers), 'layer')}"
    echo(f"{source} ({routing.source}): {tokens}{counts}")
    click.echo()
    rows = [("layer", "experts", "busiest/mean", "entropy", "unused", "drift", "strongest pair")]
    for layer in layers:
        pair = "-" if layer.pair is None else f"{layer.pair[0]}+{layer.pair[1]} x{layer.lift:.1f}"
        drift = "-" if layer.drift is None else f"{layer.drift:.3f}"
        cells = f"{layer.busiest:.2f}", f"{layer.entropy:.3f}", str(layer.unused), drift, pair
        rows.append((str(layer.layer), str(layer.experts), *cells))
    echo("\n".join(line.rstrip() for line in columns(rows)))
    click.echo(
        "\ndrift: share of choices that changed from the first to the second half of the tokens"
    )
    click.echo("pair: how often two experts are chosen by one token, relative to chance")
    for path in (picture, output):
        if path:
            echo(f"wrote {path}")


def _show_cache(source: Path, routing: ImportedRouting, *, as_json: bool) -> None:
    """The share of needed experts that are in memory, by policy and by how many experts are."""
    from moec.files.printable import columns
    from moec.plan.simulation.residency import SHARES, hit_rates
    from moec.runtime.expert_store.native import POLICIES

    if routing.trace is None:
        raise SetupError(f"{source} has counts only; --cache needs the experts of each token")
    rates = hit_rates(routing.trace)
    best = max(
        (e for e in rates if e.policy in POLICIES), key=lambda eviction: sum(rates[eviction])
    )
    if as_json:
        rows = [{"policy": e.label, "hits": rates[e], "best": e == best} for e in rates]
        click.echo(json.dumps({"shares": SHARES, "policies": rows}, indent=1))
        return
    lines = [("policy", *(f"{share:.0%} in memory" for share in SHARES))]
    lines += [(e.label, *(f"{hits:.1%}" for hits in rates[e])) for e in rates]
    echo("\n".join(line.rstrip() for line in columns(lines)))
    click.echo("\npinned and belady know the trace before they replay it; a belady needs routers")
    click.echo("that are hoisted, and sees as many steps ahead as it says")
    echo(f"the best that moec run --memory has: {best.label}")
