"""`moec serve ARTIFACT`: an HTTP server with the interface of OpenAI, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands.compilation.cached_model import artifact_of
from moec.commands.execution.draft import open_draft
from moec.commands.execution.engine import (
    EngineOptions,
    check_one_process,
    engine_options,
    open_engine,
)
from moec.commands.options.sampling import draft_option, of_options, speculate_option
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import UsageError

if TYPE_CHECKING:
    from moec.runtime.text.embed import Pooling
    from moec.serving.metrics import MetricFamilies
    from moec.serving.service import Service

UNCOUNTED = "Tokens of experts are counted where the model was compiled with --record-routing"
NO_EMBEDDINGS = "embeddings need moec compile --embeddings, and moec serve without --memory"
UNCOUNTED_STORE = "Tokens of experts are not counted with --memory"


@click.command("serve")
@click.argument("artifacts", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one."
)
@click.option(
    "--slots", type=click.IntRange(1, 4096), default=8, show_default=True,
    help="How many texts of a model are continued at the same time; each has caches for --context "
    "tokens.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(min=0), default=64, show_default=True,
    help="How many texts of a model wait for a slot; more are refused with 429.",
)  # fmt: skip
@click.option(
    "--api-key", metavar="KEY", envvar="MOEC_API_KEY",
    help="Requests need this key; better set as MOEC_API_KEY, as arguments show in ps.",
)  # fmt: skip
@click.option(
    "--allowed-host", "hosts", metavar="NAME", multiple=True,
    help="Another name by which the server is reached, such as a container's; repeatable; *: any.",
)  # fmt: skip
@click.option(
    "--allow-origin", "origins", metavar="ORIGIN", multiple=True,
    help="Pages of this origin, such as https://chat.example, may use the server; repeatable; "
    "*: all pages.",
)  # fmt: skip
@click.option("--name", help="The model's name in requests; default: that of the file.")
@engine_options
@speculate_option
@draft_option
@click.option(
    "--pooling", type=click.Choice(["mean", "last"]), default="mean", show_default=True,
    help="Embeddings are the mean of the hidden states of a text, or that of its last token.",
)  # fmt: skip
@click.option(
    "--drain", type=click.FloatRange(min=0), default=30.0, show_default=True,
    help="Seconds that texts under way have after SIGTERM.",
)  # fmt: skip
@log_options
def command(
    artifacts: tuple[Path, ...],
    host: str,
    port: int,
    slots: int,
    queue: int,
    api_key: str | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    name: str | None,
    drain: float,
    speculate: int | str,
    draft: Path | None,
    pooling: Pooling,
    **options: Any,
) -> None:
    """Serve ARTIFACTS, or models as for `moec run`, at http://HOST:PORT/v1, for any client of
    OpenAI's interface.

    Several are told apart by the field `model` of requests; the first is for those without one.
    SIGTERM and Ctrl-C let texts under way end first; a second one ends the process at once.
    """
    names = _names(artifacts, name, options["memory"], draft)
    from moec.serving.access import read_access
    from moec.serving.metrics import MetricFamilies
    from moec.serving.server import Server, listen
    from moec.serving.service import ServedModels

    families, engine = MetricFamilies(), EngineOptions(**options)
    with listen(host, port) as listener:
        rules = read_access(listener, host, hosts, origins, api_key)
        models = {
            name: _service(
                *(artifact_of(artifact), name, slots, queue, engine, families),
                *(speculate, draft, pooling),
            )
            for name, artifact in names.items()
        }
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}/v1"
        echo(f"{', '.join(models)} at {url}", err=True)
        for name, service in models.items():
            if drawn := service.tokenizer.sampling.temperature and str(service.tokenizer.sampling):
                echo(f"{name}: where requests do not say, tokens are drawn with {drawn}", err=True)
        Server(ServedModels(models, families), rules, drain).run([listener])


def _names(
    artifacts: Sequence[Path], name: str | None, memory: str | None, draft: Path | None
) -> dict[str, Path]:
    """The artifacts by the names of their models. Raises UsageError where two have the same, or an
    option is for one artifact."""
    for option, value in (("--name", name), ("--memory", memory), ("--draft", draft)):
        if value is not None and len(artifacts) > 1:
            raise UsageError(f"{option} is for one artifact, and there are {len(artifacts)}")
    names: dict[str, Path] = {}
    for artifact in artifacts:
        check_one_process(artifact)
        model = name or (artifact.stem if artifact.suffix in (".moec", ".gguf") else artifact.name)
        if model in names:
            raise UsageError(
                f"{names[model]} and {artifact} are both named {model}: rename one of the files"
            )
        names[model] = artifact
    return names


def _service(
    artifact: Path,
    name: str,
    slots: int,
    queue: int,
    options: EngineOptions,
    families: MetricFamilies,
    speculate: int | str,
    draft: Path | None,
    pooling: Pooling,
) -> Service:
    from moec.runtime.package import HIDDEN
    from moec.runtime.text.embed import embed
    from moec.runtime.text.request import Request
    from moec.serving.routing_watch import RoutingWatch
    from moec.serving.service import Service

    model, engine, stop = open_engine(artifact, slots, options)
    embeds = HIDDEN in model.executor.package.functions
    small = open_draft(draft, model.executor, lambda: model.tokenizer)
    with of_options():  # refused now, not later
        engine.check([0], Request(1, speculate=speculate, draft=small))
    digests = [part.sha256 for _, part in sorted(model.artifact.manifest.parts.items())]
    fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    routing = RoutingWatch(model.executor) if model.executor.package.recorded else None
    uncounted = UNCOUNTED_STORE if model.artifact.package.recorded else UNCOUNTED
    return Service(
        name, fingerprint, engine, model.tokenizer, stop, queue, families, routing, uncounted,
        speculate, small, partial(embed, model.executor, pooling=pooling) if embeds else None,
        NO_EMBEDDINGS,
    )  # fmt: skip
