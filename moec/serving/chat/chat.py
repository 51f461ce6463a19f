"""`moec chat ARTIFACT`: a chat in the terminal, or an answer to each line of stdin."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands.compilation.cached_model import artifact_of
from moec.commands.execution.draft import open_draft
from moec.commands.execution.engine import (
    check_one_process,
    engine_of,
    engine_options,
    open_engine,
)
from moec.commands.execution.memory import store_answer
from moec.commands.execution.text import decoded
from moec.commands.options.options import json_option
from moec.commands.options.sampling import of_options, sampling_line, sampling_of, sampling_options
from moec.commands.output.logs import log_options
from moec.files.printable import printable

if TYPE_CHECKING:
    from moec.serving.chat.answer import Chat


@click.command("chat")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="The system message, which comes before all others.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N",
    help="The most tokens of an answer; default: what --context leaves.",
)  # fmt: skip
@sampling_options
@engine_options
@click.option("--no-history", is_flag=True, help="Neither read nor write what was typed before.")
@json_option
@log_options
def command(
    artifact: Path,
    system: str | None,
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    no_history: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Chat with ARTIFACT, or a model as for `moec run`, by its template; /help lists the commands.

    Where stdin or stdout is no terminal, each line of stdin is a message, and its answer is printed
    as it comes. --json prints all messages at the end instead.
    """
    check_one_process(artifact)
    from moec.runtime.text.request import Request
    from moec.runtime.text.sampling import Sampling
    from moec.runtime.text.write_text import StopCut
    from moec.serving.chat.answer import Chat

    sampling_of(options, Sampling(temperature=1.0))  # what no model can mend is refused now
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    if in_terminal:  # before the model loads, as it may lack an extra
        from moec.serving.chat.terminal import converse, history_file, new_session, note

        session = new_session(None if no_history else history_file())
    compiled = artifact_of(artifact, as_json)
    model, texts, ends = open_engine(compiled, 1, engine_of(options))
    model.tokenizer.check_chat()
    sampling = sampling_of(options, model.tokenizer.sampling)
    most, speculate = max_new_tokens or texts.room, options["speculate"]
    draft = open_draft(options["draft"], model.executor, lambda: model.tokenizer)
    with of_options():
        request = Request(most, sampling, ends, speculate=speculate, draft=draft)
        texts.check([0], replace(request, most=1))  # refused now, not at the first message
        StopCut(stop)
    chat = Chat(texts, model.tokenizer, request, stop)
    if system is not None:
        chat.add("system", system)
    if not in_terminal:
        answer_lines(chat, as_json)
        store = store_answer(model.executor, as_json)
        if as_json:
            result = {"artifact": str(artifact), "messages": chat.messages, **store}
            click.echo(json.dumps(result, indent=1))
        return
    from rich.console import Console

    console = Console()
    note(console, f"{artifact.name}, {texts.room:,} tokens; /help lists the commands", "dim")
    note(console, sampling_line(sampling) + "\n", "dim")
    converse(chat, session, console)
    store_answer(model.executor, silent=False)


def answer_lines(chat: Chat, silent: bool) -> None:
    """Answer each line of stdin that is not empty; all are messages."""

    def show(piece: str) -> None:
        if piece and not silent:
            click.echo(printable(piece) if sys.stdout.isatty() else piece, nl=False)
            sys.stdout.flush()

    for line in sys.stdin.buffer:
        if text := decoded("stdin", line).strip():
            chat.add("user", text)
            chat.answer(show)
            show("\n")
