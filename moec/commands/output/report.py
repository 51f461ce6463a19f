"""Prints the report of a compilation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.commands.output.echo import echo

if TYPE_CHECKING:
    from moec.report.report import Report


def print_report(report: Report, full: bool, last: str = "") -> None:
    """The report for people, in a few lines or in full, and after it the line `last`."""
    from moec.report.text import render, terminal_width

    text = render(report, terminal_width(), sys.stdout.isatty()) if full else report.brief
    click.echo(text, nl=False)
    if last:
        echo(last)


def print_json(report: Report, output: Path | None) -> None:
    click.echo(json.dumps({**report.to_dict(), "output": output and str(output)}, indent=1))
