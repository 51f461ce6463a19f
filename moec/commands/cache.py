"""`moec cache`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from moec.commands.options.options import json_option
from moec.commands.output.echo import echo
from moec.errors import SetupError, UsageError

if TYPE_CHECKING:
    from moec.cache import Entry


@click.group("cache", invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Show the folder of the cache of compiled kernels, and its contents.

    The folder is $MOEC_CACHE, or moec in the user's cache folder; MOEC_CACHE=off disables the
    cache. Its size is limited to $MOEC_CACHE_SIZE GiB (default 2); the least recently used entries
    are removed first. Models that `moec run`, `chat` and `serve` compiled stay until `prune` or
    `clear`.
    """
    if ctx.invoked_subcommand is not None:
        return
    from moec import cache

    folder = cache.default_folder()
    if folder is None:
        click.echo(
            json.dumps({"folder": None}) if as_json else "MOEC_CACHE is off: nothing is cached"
        )
        return
    if folder.exists() and not folder.is_dir():
        raise SetupError(
            f"MOEC_CACHE is {folder}, which is not a folder: set it to a folder, or to off"
        )
    limit = cache.limit()
    store = cache.Store(folder, limit)
    counts = {kind: [0, 0] for kind in (*cache.KINDS, cache.MODELS)}
    for entry in cache.entries(store):
        counts[entry.kind][0] += 1
        counts[entry.kind][1] += entry.size
    if as_json:
        kinds = {kind: {"entries": n, "bytes": size} for kind, (n, size) in counts.items()}
        click.echo(json.dumps({"folder": str(folder), "limit": limit, "kinds": kinds}, indent=1))
        return
    from moec.report.units import size as size_text

    echo(f"{folder}, at most {size_text(limit)}")
    for kind, (number, size) in counts.items():
        click.echo(f"  {kind:10} {number:6}  {size_text(size)}")


@command.command("list", short_help="Show the models that were compiled to run them.")
@json_option
def list_models(as_json: bool) -> None:
    """Show the models that `moec run`, `chat` and `serve` compiled, those used last first."""
    from moec.report.units import size

    present = [(entry, round(_days(entry), 1)) for entry in _models()]
    if as_json:
        rows = [{"model": e.path.name, "bytes": e.size, "days": days} for e, days in present]
        click.echo(json.dumps(rows, indent=1))
    for entry, days in () if as_json else present:
        echo(f"{size(entry.size):>9}  used {days} days ago  {entry.path.name}")


@command.command("prune", short_help="Remove models that were not run for a while.")
@click.argument("models", nargs=-1)
@click.option(
    "--days", type=click.FloatRange(min=0), metavar="N",
    help="Remove what was not used for so many days; default: 30, and with MODELS 0.",
)  # fmt: skip
def prune(models: tuple[str, ...], days: float | None) -> None:
    """Remove MODELS, by the start of their names in the list, or all that were not used lately."""
    least = (0.0 if models else 30.0) if days is None else days
    present = _models()
    for name in models:
        if not any(entry.path.name.startswith(name) for entry in present):
            raise UsageError(f"no model of the cache begins with {name}: see moec cache list")
    for entry in present:
        if entry.path.name.startswith(models or "") and _days(entry) >= least:
            entry.path.unlink(missing_ok=True)
            echo(f"removed {entry.path.name}")


def _days(entry: Entry) -> float:
    """Since it was last used."""
    return max(0.0, (time.time() - entry.used) / 86400)


def _models() -> list[Entry]:
    from moec import cache

    store = cache.Store(cache.default_folder())
    return sorted(cache.entries(store, (cache.MODELS,)), key=lambda entry: -entry.used)


@command.command("clear", short_help="Remove every entry.")
def clear() -> None:
    """Remove every entry; kernels are compiled again when they are needed."""
    from moec import cache

    folder = cache.default_folder()
    if folder is None:
        raise UsageError("MOEC_CACHE is off: there is no cache to clear")
    number = cache.clear(cache.Store(folder))
    echo(f"removed {number} {'entry' if number == 1 else 'entries'} from {folder}")
