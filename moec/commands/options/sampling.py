"""Options of commands that draw tokens: how, and before which texts they stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moec.errors import InputError, UsageError

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


@contextmanager
def of_options() -> Iterator[None]:
    """While open, an input that is refused is an option of the command line."""
    try:
        yield
    except InputError as error:
        raise UsageError(str(error)) from error


def sampling_options(command: F) -> F:
    """Adds --stop, the fields of `Sampling`, --speculate, and --draft."""
    for decorator in (
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."
        ),
        click.option(
            "--temperature", type=float,
            help="0 chooses the likeliest token; greater values sample. This and the next four are "
            "by default what the model's generation_config.json says, else 0 and no limit.",
        ),
        click.option(
            "--top-p", type=float, help="Sample from the likeliest tokens whose "
            "probabilities sum to this."
        ),
        click.option("--top-k", type=int, help="Sample from this many of the likeliest tokens."),
        click.option(
            "--min-p", type=float,
            help="Sample from tokens at least this many times as likely as the likeliest.",
        ),
        click.option(
            "--repetition-penalty", type=float,
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


def sampling_of(options: Mapping[str, Any], default: Sampling) -> Sampling:
    """How tokens are drawn, by the options that are given under their names, else by the model's
    default. Raises UsageError where `Sampling` refuses them."""
    with of_options():
        return default.changed({name: options[name] for name in NAMES if options[name] is not None})


def sampling_line(sampling: Sampling) -> str:
    """What to say of it before the first token; empty where the likeliest is taken."""
    if not sampling.temperature:
        return ""
    return f"tokens are drawn with {sampling}; --temperature 0 takes the likeliest"
