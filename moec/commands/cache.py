"""`moec cache`."""

from __future__ import annotations

import json

import click

from moec.commands.options.options import json_option
from moec.commands.output.echo import echo
from moec.errors import UsageError


@click.group(
    "cache", short_help="Show or clear the cache of compiled code.", invoke_without_command=True
)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Show the folder of the cache of compiled kernels, and its contents.

    The folder is $MOEC_CACHE, or moec in the user's cache folder; MOEC_CACHE=off disables the
    cache. Its size is limited to $MOEC_CACHE_SIZE GiB (default 2); the least recently used entries
    are removed first.
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
        raise UsageError(
            f"MOEC_CACHE is {folder}, which is not a folder: set it to a folder, or to off"
        )
    limit = cache.limit()
    store = cache.Store(folder, limit)
    counts = {kind: [0, 0] for kind in cache.KINDS}
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


@command.command("clear", short_help="Remove every entry.")
def clear() -> None:
    """Remove every entry; kernels are compiled again when they are needed."""
    from moec import cache

    folder = cache.default_folder()
    if folder is None:
        raise UsageError("MOEC_CACHE is off: there is no cache to clear")
    number = cache.clear(cache.Store(folder))
    echo(f"removed {number} {'entry' if number == 1 else 'entries'} from {folder}")
