"""What commands write of names and texts that may come from a stranger's file."""

from __future__ import annotations

import click

from moec.files.printable import printable


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Write a text to stdout, or to stderr, with control characters as escapes."""
    click.echo(printable(text), err=err, nl=nl)
