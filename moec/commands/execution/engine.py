"""Opens a model whose texts an engine continues, for a server or a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moec.commands.execution.ranks import holds_ranks
from moec.commands.options.options import memory_option, signed_by_option
from moec.errors import SetupError

if TYPE_CHECKING:
    from moec.model.load import LoadedModel
    from moec.runtime.text.engine import Engine

CONTEXT = 4096  # of a model that takes more, unless the user says otherwise

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class EngineOptions:
    """The options of `engine_options`, under their names."""

    context: int | None
    prefix_tokens: int | None
    memory: str | None
    threads: int | None
    signed_by: Path | None


def engine_options(command: F) -> F:
    for decorator in (
        signed_by_option,
        click.option(
            "--threads", type=click.IntRange(1, 4096),
            help="Threads of the kernels; default: one per core.",
        ),
        memory_option,
        click.option(
            "--prefix-tokens", type=click.IntRange(min=0), metavar="N",
            help="How many tokens of prompts are stored, for prompts that begin alike; 0: none. "
            "Default: as many as all texts may have.",
        ),
        click.option(
            "--context", type=click.IntRange(min=2), metavar="N",
            help="The most tokens of a text, with its prompt; default: the model's limit, or "
            f"{CONTEXT}.",
        ),
    ):  # fmt: skip
        command = decorator(command)
    return command


def engine_of(options: Mapping[str, Any]) -> EngineOptions:
    """The options of `engine_options` among others, by their names."""
    return EngineOptions(**{field.name: options[field.name] for field in fields(EngineOptions)})


def check_one_process(artifact: Path) -> None:
    """Raises UsageError for the ranks of a plan."""
    if holds_ranks(artifact):
        command = click.get_current_context().command_path
        raise SetupError(f"{artifact} has the ranks of a plan: {command} is for one process")


def open_engine(
    artifact: Path, slots: int, options: EngineOptions
) -> tuple[LoadedModel, Engine, frozenset[int]]:
    """The model, its engine, and the tokens that end a text.

    Raises as `moec.load` and `Engine`.
    """
    from moec import load
    from moec.runtime.device.device import CPU
    from moec.runtime.process.threads import set_threads
    from moec.runtime.text.engine import Engine

    set_threads(options.threads)
    most, stored = options.context or CONTEXT, options.prefix_tokens
    model = load(
        artifact,
        signed_by=options.signed_by,
        memory=options.memory,
        texts=slots + 1 + (slots if stored is None else -(-stored // most)),  # one comes in
        room=most,
    )
    generation = model.artifact.package.generation
    longest = generation.longest if generation else None
    room = options.context or min(longest or CONTEXT, CONTEXT)
    if stored is None:
        stored = slots * room if model.executor.device.kind == CPU else 0
    engine = Engine(model.executor, slots, room, prefix_tokens=stored)
    stop = frozenset(generation.stop if generation else ()) or model.tokenizer.stop
    return model, engine, stop
