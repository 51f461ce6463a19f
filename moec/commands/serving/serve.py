"""`moec serve ARTIFACT`: an HTTP server with the interface of OpenAI, without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import click

from moec.commands.execution.engine import (
    EngineOptions,
    check_one_process,
    engine_options,
    open_engine,
)
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import UsageError

UNCOUNTED = "Tokens of experts are counted where the model was compiled with --record-routing"
UNCOUNTED_STORE = "Tokens of experts are not counted with --memory"


@click.command("serve", short_help="Serve an artifact over HTTP, as OpenAI does.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one."
)
@click.option(
    "--slots", type=click.IntRange(1, 4096), default=8, show_default=True,
    help="How many texts are continued at the same time; each has caches for --context tokens.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(min=0), default=64, show_default=True,
    help="How many texts wait for a slot; more are refused with 429.",
)  # fmt: skip
@click.option(
    "--api-key", metavar="KEY", envvar="MOEC_API_KEY",
    help="Requests need this key; better set as MOEC_API_KEY, as arguments show in ps.",
)  # fmt: skip
@click.option("--name", help="The model's name in requests; default: that of the file.")
@engine_options
@click.option(
    "--drain", type=click.FloatRange(min=0), default=30.0, show_default=True,
    help="Seconds that texts under way have after SIGTERM.",
)  # fmt: skip
@log_options
def command(
    artifact: Path,
    host: str,
    port: int,
    slots: int,
    queue: int,
    api_key: str | None,
    name: str | None,
    drain: float,
    **options: Any,
) -> None:
    """Serve ARTIFACT at http://HOST:PORT/v1, for any client of OpenAI's interface.

    SIGTERM and Ctrl-C let texts under way end first; a second one ends the process at once.
    """
    check_one_process(artifact)
    if api_key == "":
        raise UsageError("--api-key is empty: give a key, or leave it out")
    from moec.commands.serving.routing_watch import RoutingWatch
    from moec.commands.serving.server import Server, listen
    from moec.commands.serving.service import Service

    with listen(host, port) as listener:
        model, engine, stop = open_engine(artifact, slots, EngineOptions(**options))
        digests = [part.sha256 for _, part in sorted(model.artifact.manifest.parts.items())]
        fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        routing = RoutingWatch(model.executor) if model.executor.package.recorded else None
        service = Service(
            name or artifact.stem, fingerprint, engine, model.tokenizer, stop, queue, api_key,
            routing, UNCOUNTED_STORE if model.artifact.package.recorded else UNCOUNTED,
        )  # fmt: skip
        address = f"[{host}]" if ":" in host else host
        echo(f"{service.model} at http://{address}:{listener.getsockname()[1]}/v1", err=True)
        Server(service, drain).run([listener])
