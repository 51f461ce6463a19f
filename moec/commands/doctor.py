"""`moec doctor`."""

from __future__ import annotations

import click

from moec.commands.options.options import json_option
from moec.errors import Exit


@click.command("doctor")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check the CPU, the packages, the linker, threads and memory.

    Exits with code 1 if something that moec needs is missing.
    """
    from moec.commands import machine

    checks = machine.examine()
    bad = [check for check in checks if check.state == machine.BAD]
    if as_json:
        click.echo(machine.as_json(checks))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark, color = _MARKS[check.state]
            click.echo(f"{click.style(mark, fg=color)} {check.name:{width}}  {check.says}")
            if check.mend:
                click.echo(f"  {'':{width}}  -> {check.mend}")
        click.echo(_verdict([check.name for check in bad]))
    ctx.exit(Exit.SETUP if bad else Exit.RIGHT)


_MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "bad": ("✗", "red")}


def _verdict(bad: list[str]) -> str:
    return (
        f"moec cannot run on this machine: fix {', '.join(bad)}"
        if bad
        else ("moec can run on this machine")
    )
