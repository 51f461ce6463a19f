"""Text of `moec run`: one prompt streamed, or many prompts from a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from moec.commands.execution.draft import open_draft
from moec.commands.execution.prompts import completed, continue_prompts
from moec.commands.options.sampling import of_options, sampling_line, sampling_of, sampling_options
from moec.commands.output.echo import echo
from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.printable import printable, printable_json
from moec.files.regular_file import open_regular

if TYPE_CHECKING:
    from moec.runtime.text.prompt import Tokenizer
    from moec.runtime.text.request import Request
    from moec.runtime.text.texts import Decoder

MOST_BYTES = 256_000_000  # of prompts

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class TextOptions:
    """The options of `text_options`, under their names."""

    prompt: str | None
    prompts: Path | None
    resume: Path | None
    stop: tuple[str, ...]
    batch: int
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    speculate: int | str
    draft: Path | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: str = "false"

    @property
    def form(self) -> str:
        """The option that was used for input (--prompt or --prompts); empty for none.

        Raises UsageError where both were used.
        """
        forms = {"--prompt": self.prompt, "--prompts": self.prompts}
        names = [name for name, value in forms.items() if value is not None]
        if len(names) > 1:
            raise UsageError("--prompt and --prompts cannot be combined: leave one out")
        return names[0] if names else ""


def text_options(command: F) -> F:
    options = (
        click.option("--prompt", metavar="TEXT", help="Continue this text; - reads it from stdin."),
        click.option(
            "--prompts", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE",
            help="Continue each line of a text file, or each string of a .jsonl; - reads stdin. "
            "Prints one line of JSON for each as its text ends: index (the line, from 0), prompt, "
            "text, tokens; or index, error, and the exit code is 3.",
        ),
        click.option(
            "--resume", type=click.Path(path_type=Path), metavar="FILE",
            help="With --prompts: skip those that have texts in the results of an earlier run.",
        ),
        click.option(
            "--batch", type=click.IntRange(min=1), default=8, show_default=True,
            help="How many of --prompts are continued at a time.",
        ),
        click.option(
            "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True
        ),
        click.option(
            "--beams", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
            help="Search the likeliest text with so many beams (num_beams of transformers).",
        ),
        click.option(
            "--length-penalty", type=float, default=1.0, show_default=True,
            help="With --beams: scores are divided by the length to this power.",
        ),
        click.option(
            "--early-stopping", type=click.Choice(["true", "false", "never"]), default="false",
            show_default=True, help="With --beams: when a search ends, as in transformers.",
        ),
        sampling_options,
    )  # fmt: skip
    for decorator in reversed(options):  # the first is shown first
        command = decorator(command)
    return command


def read_prompts(options: TextOptions) -> list[str | None]:
    """The prompts, one for each line of a file (None: it is no JSON string).

    Raises UsageError where a file has none, or cannot be read.
    """
    if options.resume is not None and options.prompts is None:
        raise UsageError("--resume continues a run of --prompts: give both")
    if options.prompt == "-":
        return [decoded("stdin", read_limited("stdin", sys.stdin.buffer))]
    if options.prompt is not None:
        return [options.prompt]
    if options.prompts is None:
        return []
    path = options.prompts
    name = "stdin" if str(path) == "-" else f"--prompts {path}"
    try:
        with nullcontext(sys.stdin.buffer) if name == "stdin" else open_regular(path) as file:
            content = read_limited(name, file)
    except OSError as error:
        raise SetupError(f"{name}: {reason(error)}") from error
    lines = decoded(name, content).splitlines()
    if not any(line.strip() for line in lines):
        raise SetupError(f"{name} has no prompt: write one per line")
    return list(map(_string, lines)) if path.suffix == ".jsonl" else [*lines]


def read_limited(name: str, file: BinaryIO) -> bytes:
    """The whole file. Raises UsageError beyond a limit, because /dev/zero would fill the memory."""
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise SetupError(f"{name} holds more than {MOST_BYTES // 10**6} MB: split it")
    return content


def decoded(name: str, content: bytes) -> str:
    """The text. Raises UsageError where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SetupError(f"{name} is not UTF-8 at byte {error.start}: convert it first") from error


def _string(line: str) -> str | None:
    try:
        value = json.loads(line) if line.strip() else ""
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def write_texts(
    files: Mapping[str, bytes],
    executor: Decoder,
    options: TextOptions,
    prompts: Sequence[str | None],
    *,
    as_json: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Continue the prompts with the tokenizer among an artifact's files; returns the result for
    --json."""
    from moec.runtime.text.generate import slow
    from moec.runtime.text.prompt import load_tokenizer
    from moec.runtime.text.request import BeamOptions, Request
    from moec.runtime.text.sampling import GREEDY
    from moec.runtime.text.write_text import StopCut

    if (why := slow(executor)) and not quiet:
        echo(
            f"slow: each new token processes the whole text again, as there is no KV cache: {why}",
            err=True,
        )
    tokenizer = load_tokenizer(files)
    generation = executor.package.generation
    stop = frozenset(generation.stop) if generation and generation.stop else tokenizer.stop
    early: bool | str = {"true": True, "false": False}.get(options.early_stopping, "never")
    draft = open_draft(options.draft, executor, lambda: tokenizer)
    with of_options():
        beams = BeamOptions(options.beams, options.length_penalty, early)
        beams.check_alone(["--stop"] if options.stop else [])
        StopCut(options.stop)
        sampling = sampling_of(vars(options), tokenizer.sampling if beams.count == 1 else GREEDY)
        request = Request(
            options.max_new_tokens, sampling, stop, speculate=options.speculate, draft=draft,
            beams=beams,
        )  # fmt: skip
    if not quiet and (line := sampling_line(sampling)):
        echo(line, err=True)
    if options.prompts is not None:
        done = completed(options.resume, prompts) if options.resume else set()
        left = {index: p for index, p in enumerate(prompts) if index not in done}
        rows = continue_prompts(tokenizer, executor, request, options.stop, options.batch, left)
        return {
            "texts": [*rows] if as_json else [_shown(row) for row in rows],
            **_speculation(executor),
        }
    (prompt,) = prompts
    assert prompt is not None
    return {"prompt": prompt} | _write_text(
        tokenizer, executor, request, options.stop, prompt, not as_json, quiet
    )


def _speculation(executor: Decoder) -> dict[str, Any]:
    """For --json: the calls that verified guesses, these, and those that were drawn, each of which
    saved its text a step."""
    account = executor.account
    names = ("calls", "guessed", "accepted")
    return {"speculation": {n: getattr(account, n) for n in names}} if account else {}


def _write_text(
    tokenizer: Tokenizer,
    executor: Decoder,
    request: Request,
    stops: Sequence[str],
    prompt: str,
    streamed: bool,
    quiet: bool,
) -> dict[str, Any]:
    from moec.report.units import counted
    from moec.runtime.text.generate import longest_of
    from moec.runtime.text.write_text import new_texts, write

    (text,) = new_texts(tokenizer, [tokenizer.encode(prompt)], stops)
    start, first = time.perf_counter(), 0.0
    for (piece,) in write(executor, [text], request):
        first = first or time.perf_counter() - start
        _echo(piece, streamed)
    seconds = time.perf_counter() - start
    count, longest = len(text.tokens), longest_of(executor)
    speed = (count - 1) / (seconds - first) if count > 1 else 0.0
    if request.beams.count > 1:  # all tokens come with the first
        speed = count / seconds
    if streamed:
        click.echo()
    if streamed and not quiet:
        full = longest is not None and len(text.prompt) + count > longest
        rate = f" at {speed:.1f} tokens/s" if count > 1 else ""  # one token is no time between two
        limit = f"; the model takes no more than {longest} tokens" if full else ""
        account = executor.account
        guessed = (
            f", {account.accepted} of {account.guessed} guesses accepted"
            if account and account.guessed else ""
        )  # fmt: skip
        read, drawn = counted(len(text.prompt), "token"), counted(count, "token")
        line = f"{read} read in {first:.2f} s, then {drawn}{rate}{guessed}"
        if request.beams.count > 1:
            way = f"searched with {request.beams.count} beams in {seconds:.2f} s"
            line = f"{read} read, {drawn} {way}"
        click.echo(line + limit, err=True)
    return {
        "text": text.written,
        "tokens": text.tokens,
        "prompt_tokens": len(text.prompt),
        "first_token_seconds": round(first, 4),
        "generate_seconds": round(seconds, 4),
        "tokens_per_second": round(speed, 2),
        **_speculation(executor),
    }


def _shown(text: dict[str, Any]) -> dict[str, Any]:
    click.echo(printable_json(json.dumps(text, ensure_ascii=False)))
    sys.stdout.flush()
    return text


def _echo(piece: str, streamed: bool) -> None:
    if streamed and piece:
        click.echo(printable(piece) if sys.stdout.isatty() else piece, nl=False)
        sys.stdout.flush()
