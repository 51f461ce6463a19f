"""Options of commands that draw tokens: how, and before which texts they stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from moec.runtime.text.sampling import Sampling

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
F = TypeVar("F", bound=Callable[..., Any])


speculate_option = click.option(
    "--speculate", default="auto", show_default=True, metavar="auto|off|N",
    callback=lambda _context, _option, value: int(value) if value.isdecimal() else value,
    help="How many tokens of a text are guessed from what it repeats, and verified together; auto: "
    "where that is measured to pay. It changes no token.",
)  # fmt: skip


draft_option = click.option(
    "--draft", type=click.Path(path_type=Path), metavar="ARTIFACT",
    help="Guess with this smaller model of the same tokenizer; see --speculate.",
)  # fmt: skip


def sampling_options(command: F) -> F:
    """Adds --stop, the fields of `Sampling`, --speculate, and --draft."""
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
            "--min-p", type=float, default=0.0,
            help="Sample from tokens at least this many times as likely as the likeliest.",
        ),
        click.option(
            "--repetition-penalty", type=float, default=1.0,
            help="Divides the scores of tokens that came before; 1 changes nothing.",
        ),
        click.option(
            "--seed", type=click.IntRange(min=0), help="Seed for sampling."
        ),
        speculate_option,
        draft_option,
    ):  # fmt: skip
        command = decorator(command)
    return command


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """How tokens are drawn, by options under their names. Raises InputError as `Sampling`."""
    from moec.runtime.text.sampling import Sampling

    return Sampling(**{name: options[name] for name in NAMES})
