"""Prints names and texts that may come from an untrusted file."""

from __future__ import annotations

import click

from moec.files.printable import printable


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Write a text to stdout, or to stderr, with control characters escaped."""
    click.echo(printable(text), err=err, nl=nl)
