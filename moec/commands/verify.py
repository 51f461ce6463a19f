"""`moec verify ARTIFACT`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.commands.execution.ranks import holds_ranks
from moec.commands.options.options import json_option, quiet_option, signed_by_option
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import ArtifactError

if TYPE_CHECKING:
    from moec.runtime.artifact.artifact import Artifact


@click.command("verify")
@click.argument("artifact", type=click.Path(path_type=Path))
@signed_by_option
@json_option
@quiet_option
@log_options
def command(artifact: Path, signed_by: Path | None, as_json: bool, quiet: bool) -> None:
    """Check that ARTIFACT is complete and undamaged, without running it.

    Checks the manifest, and the size and SHA-256 of every part; if the compiler is installed, also
    the rules of the IR for every graph. Artifacts for other machines and versions of TVM can be
    checked too. The digests detect damage, not malice: --signed-by verifies who made the file.
    """
    from moec.runtime.arrays.compare import difference
    from moec.runtime.artifact import artifact as artifacts

    if holds_ranks(artifact):
        _verify_ranks(artifact, signed_by, as_json, quiet)
        return
    opened = artifacts.read(artifact, native=False, signed_by=signed_by)
    opened.verify()
    for output, array in (pair for sample in opened.samples for pair in sample.outputs.items()):
        if difference(array, array):
            raise ArtifactError(f"{artifact}: the sample's {output} holds NaN: compile it again")
    graphs = _check_graphs(opened)
    size = sum(part.size for part in opened.manifest.parts.values())
    facts = {
        "artifact": str(artifact),
        "parts": len(opened.manifest.parts),
        "bytes": size,
        "functions": list(opened.package.functions),
        "graphs_checked": graphs,
        "target": opened.manifest.target_name,
        "signed_by": None if signed_by is None else str(signed_by),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    elif not quiet:
        checked = "" if graphs else "; its graphs were not read: the compiler is not installed"
        names = ", ".join(opened.package.functions)
        from moec.report.units import counted

        signed = "" if signed_by is None else f" and signed with the key in {signed_by}"
        echo(
            f"{artifact} is intact{signed}: {counted(len(opened.manifest.parts), 'part')}, "
            f"{size / 1e6:.1f} MB, functions {names}, for {opened.manifest.target_name}{checked}"
        )


def _verify_ranks(folder: Path, signed_by: Path | None, as_json: bool, quiet: bool) -> None:
    from moec.parallel.store import verify_folder
    from moec.report.units import counted

    manifest, _ = verify_folder(folder, signed_by)
    size = sum(part.size for part in manifest.parts.values())
    if as_json:
        facts = {"artifact": str(folder), "parts": len(manifest.parts), "bytes": size}
        facts |= {"ranks": manifest.devices, "signed_by": signed_by and str(signed_by)}
        click.echo(json.dumps(facts, indent=1))
    elif not quiet:
        signed = "" if signed_by is None else f" and signed with the key in {signed_by}"
        parts, ranks = counted(len(manifest.parts), "part"), counted(manifest.devices, "rank")
        echo(f"{folder} is intact{signed}: {parts}, {size / 1e6:.1f} MB, for {ranks}")


def _check_graphs(opened: Artifact) -> bool:
    """Whether the graphs could be read; False without the compiler. Raises ArtifactError for a
    malformed graph."""
    try:
        from moec.model.stored import stored_graph
    except ImportError:
        return False
    for name, text in opened.graphs.items():
        stored_graph(opened.path, name, text)
    return True
