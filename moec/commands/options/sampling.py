"""Options of commands that draw tokens: how, and before which texts they stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def sampling_options(command: F) -> F:
    """Adds --stop, and the fields of `Sampling`."""
    for decorator in (
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."
        ),
        click.option(
            "--temperature", type=float, default=0.0, show_default=True,
            help="0 chooses the likeliest token; greater values sample.",
        ),
        click.option(
            "--top-p", type=float, default=1.0, help="Sample from the likeliest tokens whose "
            "probabilities sum to this."
        ),
        click.option("--top-k", type=int, help="Sample from this many of the likeliest tokens."),
        click.option(
            "--seed", type=click.IntRange(min=0), help="Seed for sampling."
        ),
    ):  # fmt: skip
        command = decorator(command)
    return command
