"""`moec bench --serve`: a server under load."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moec.errors import SetupError, UsageError

if TYPE_CHECKING:
    from moec.inspect.bench.served import ServedResult


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class ServeOptions:
    """The options of `serve_options`, under their names."""

    server: str
    rates: str
    clients: str
    requests: int
    api_key: str


def serve_options(command: F) -> F:
    for decorator in (
        click.option(
            "--serve", "server", default="", metavar="URL_OR_ARTIFACT",
            help="Instead, load a server: that at http://HOST:PORT/v1, or one that is started for "
            "an artifact.",
        ),
        click.option(
            "--rate", "rates", default="", metavar="LIST",
            help="With --serve: requests per second at random moments, such as 1,2,4.",
        ),
        click.option(
            "--clients", default="", metavar="LIST",
            help="With --serve: clients that each wait for their answer; default: 1,4,16.",
        ),
        click.option(
            "--requests", type=click.IntRange(min=1), default=64, show_default=True,
            help="With --serve: how many are sent for each load.",
        ),
        click.option(
            "--api-key", default="", metavar="KEY", envvar="MOEC_API_KEY",
            help="With --serve: its key.",
        ),
    ):  # fmt: skip
        command = decorator(command)
    return command


def print_served(
    options: ServeOptions,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a server, print the result, and draw it."""
    from moec.commands.output.progress import Progress

    rates, clients = _numbers(options.rates, "--rate"), _numbers(options.clients, "--clients")
    clients = clients or ([] if rates else [1, 4, 16])
    loads = [(rate, 0) for rate in rates] + [(0.0, int(count)) for count in clients]
    with Progress(quiet=quiet or as_json) as progress:
        result = _measure(options, loads, prompt_tokens, new_tokens, threads, progress.phase)
    if plot:
        from moec.inspect.bench.served import plot as draw

        draw(result, plot)
    click.echo(json.dumps(result.to_dict(), indent=1) if as_json else str(result))


def _numbers(text: str, option: str) -> list[float]:
    """The numbers of a list such as 1,4,16. Raises UsageError."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [0.0]
    if any(not 0 < value < 1e6 for value in values):
        raise UsageError(f"{option} {text}: give numbers above 0, such as 1,4,16")
    return values


def _measure(
    options: ServeOptions,
    loads: Sequence[tuple[float, int]],
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    progress: Callable[[str], object],
) -> ServedResult:
    """Measure the server at a URL, or one that is started for an artifact. Raises UsageError where
    there is none."""
    from moec.inspect.bench.clients import ServerLoad, measure
    from moec.inspect.bench.served import ServedResult, served
    from moec.target.cpu import processor

    target, key = options.server, options.api_key
    slots = max((count for _, count in loads if count), default=16)
    with _server(target, slots, prompt_tokens + new_tokens, threads) as url:
        measure(url, ServerLoad(2, prompt_tokens, new_tokens, clients=1), key)  # fills caches
        lines = []
        for seed, (rate, clients) in enumerate(loads, 1):  # a server may know earlier prompts
            load = ServerLoad(options.requests, prompt_tokens, new_tokens, rate, clients)
            progress(load.name)
            lines.append(served(load, measure(url, load, key, seed)))
    name = target if target.startswith("http") else Path(target).name
    return ServedResult(name, f"{processor()}, {platform.machine()}", tuple(lines))


@contextmanager
def _server(target: str, slots: int, room: int, threads: int | None) -> Iterator[str]:
    """The address of a server with /v1; one of an artifact runs while this is open."""
    if re.match("https?://", target):
        yield target if target.rstrip("/").endswith("/v1") else target.rstrip("/") + "/v1"
        return
    command = [sys.executable, "-m", "moec", "serve", target, "--port", "0"]
    command += ["--slots", str(slots), "--context", str(room), "--queue", "100000"]
    command += ["--prefix-tokens", "0"]
    command += [] if threads is None else ["--threads", str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        try:
            line = child.stderr.readline()
            if not (address := re.search(r"http://\S+/v1", line)):
                raise SetupError((line + child.stderr.read()).strip().removeprefix("error: "))
            yield address[0]
        finally:
            child.terminate()
            child.wait()
