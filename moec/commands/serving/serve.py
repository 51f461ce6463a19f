"""`moec serve ARTIFACT`: an HTTP server with the interface of OpenAI, without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from moec.commands.execution.ranks import holds_ranks
from moec.commands.options.options import memory_option, signed_by_option
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import UsageError

CONTEXT = 4096  # of a model that takes more, unless the user says otherwise


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
    "--context", type=click.IntRange(min=2), metavar="N",
    help=f"The most tokens of a text, with its prompt; default: the model's limit, or {CONTEXT}.",
)  # fmt: skip
@click.option(
    "--prefix-tokens", type=click.IntRange(min=0), metavar="N",
    help="How many tokens of prompts are stored, for prompts that begin alike; 0: none. "
    "Default: as many as --slots hold.",
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
@memory_option
@click.option(
    "--threads", type=click.IntRange(1, 4096), help="Threads of the kernels; default: one per core."
)
@click.option(
    "--drain", type=click.FloatRange(min=0), default=30.0, show_default=True,
    help="Seconds that texts under way have after SIGTERM.",
)  # fmt: skip
@signed_by_option
@log_options
def command(
    artifact: Path,
    host: str,
    port: int,
    slots: int,
    context: int | None,
    prefix_tokens: int | None,
    queue: int,
    api_key: str | None,
    name: str | None,
    memory: str | None,
    threads: int | None,
    drain: float,
    signed_by: Path | None,
) -> None:
    """Serve ARTIFACT at http://HOST:PORT/v1, for any client of OpenAI's interface.

    SIGTERM and Ctrl-C let texts under way end first; a second one ends the process at once.
    """
    if holds_ranks(artifact):
        raise UsageError(f"{artifact} has the ranks of a plan: moec serve is for one process")
    if api_key == "":
        raise UsageError("--api-key is empty: give a key, or leave it out")
    from moec import load
    from moec.commands.serving.server import Server, listen
    from moec.commands.serving.service import Service
    from moec.runtime.device.device import CPU
    from moec.runtime.process.threads import set_threads
    from moec.runtime.text.engine import Engine

    set_threads(threads)
    with listen(host, port) as listener:
        most = context or CONTEXT
        stored = slots if prefix_tokens is None else -(-prefix_tokens // most)
        model = load(
            artifact, signed_by=signed_by, memory=memory,
            texts=slots + stored + 1, room=most,  # one more comes in
        )  # fmt: skip
        generation = model.artifact.package.generation
        longest = generation.longest if generation else None
        room = context or min(longest or CONTEXT, CONTEXT)
        if prefix_tokens is None:
            prefix_tokens = slots * room if model.executor.device.kind == CPU else 0
        engine = Engine(model.executor, slots, room, prefix_tokens=prefix_tokens)
        stop = frozenset(generation.stop if generation else ()) or model.tokenizer.stop
        digests = [part.sha256 for _, part in sorted(model.artifact.manifest.parts.items())]
        fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        service = Service(
            name or artifact.stem, fingerprint, engine, model.tokenizer, stop, queue, api_key
        )
        address = f"[{host}]" if ":" in host else host
        echo(f"{service.model} at http://{address}:{listener.getsockname()[1]}/v1", err=True)
        Server(service, drain).run([listener])
