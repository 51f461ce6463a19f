"""Many prompts from a file: each has its index, and fails alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.errors import InputError, SetupError
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular

if TYPE_CHECKING:
    from moec.runtime.text.engine import Continuation
    from moec.runtime.text.prompt import Tokenizer
    from moec.runtime.text.request import Request
    from moec.runtime.text.texts import Decoder
    from moec.runtime.text.write_text import Text

Row = dict[str, Any]
"""`index`, `prompt`, `text` and `tokens`; or `index` and `error`."""


def completed(path: Path, prompts: Sequence[str | None]) -> set[int]:
    """The indices of the prompts that have texts in the results of an earlier run.

    Raises UsageError where the file is no such results, or of other prompts. Its last line may be
    incomplete.
    """
    try:
        *lines, last = read_regular(path).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise SetupError(f"--resume {path}: {why}") from error
    del last  # empty, or cut as the run was ended
    indices = set()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            index = row["index"]
            same = "error" in row or prompts[index] == row["prompt"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            where = f"--resume {path}, line {number}"
            raise SetupError(f"{where}: it is no result of --prompts") from None
        if not same:
            raise SetupError(f"--resume {path}, line {number}: it is of another prompt")
        if "error" not in row:
            indices.add(index)
    return indices


def continue_prompts(
    tokenizer: Tokenizer,
    executor: Decoder,
    request: Request,
    stops: Sequence[str],
    batch: int,
    prompts: Mapping[int, str | None],
) -> Iterator[Row]:
    """The rows of the prompts, by index, as their texts end; at most `batch` run at a time."""
    from moec.runtime.call.executor import Executor
    from moec.runtime.text.generate import longest_of

    longest, encoded = longest_of(executor), {}
    for index, prompt in prompts.items():
        tokens = tokenizer.encode(prompt) if prompt and prompt.strip() else []
        if error := _error(prompt, tokens, longest):
            yield {"index": index, "error": error}
        else:
            encoded[index] = tokens
    if isinstance(executor, Executor) and executor.package.generation is not None:
        rows = _by_engine(tokenizer, executor, request, stops, batch, encoded)
    else:
        rows = _in_batches(tokenizer, executor, request, stops, batch, encoded)
    for index, row in rows:
        yield {"index": index, "prompt": prompts[index], **row} if "text" in row else {
            "index": index, **row
        }  # fmt: skip


def _error(prompt: str | None, tokens: Sequence[int], longest: int | None) -> str:
    """The reason why a prompt cannot be continued; empty if it can."""
    if prompt is None:
        return "the line is no JSON string"
    if not len(tokens):
        return "the prompt is empty"
    if longest is not None and len(tokens) >= longest:
        return f"the prompt has {len(tokens)} tokens, and a text has at most {longest}"
    return ""


def _by_engine(
    tokenizer: Tokenizer,
    executor: Any,
    request: Request,
    stops: Sequence[str],
    batch: int,
    prompts: Mapping[int, Sequence[int]],
) -> Iterator[tuple[int, Row]]:
    from moec.runtime.text.generate import engine_for, longest_of
    from moec.runtime.text.write_text import new_texts

    if not prompts:
        return
    longest = longest_of(executor)
    most = max(map(len, prompts.values())) + request.most
    room = most if longest is None else min(most, longest)
    engine = engine_for(executor, min(batch, len(prompts)), room, request)
    waiting = iter(prompts.items())
    texts: dict[Continuation, tuple[int, Text]] = {}
    while True:
        while engine.running + len(engine.waiting) <= engine.slots:
            index, tokens = next(waiting, (-1, ()))
            if index < 0:
                break
            fitting = replace(request, most=min(request.most, room - len(tokens)))
            (text,) = new_texts(tokenizer, [tokens], stops)
            texts[engine.submit(tokens, fitting, index)] = index, text
        if not engine.busy:
            return
        for continuation in engine.step().advanced:
            index, text = texts[continuation]
            if row := _advance(engine, continuation, text, request):
                del texts[continuation]
                yield index, row


def _advance(engine: Any, continuation: Continuation, text: Text, request: Request) -> Row | None:
    """Add the latest tokens to a text; its row where it has ended."""
    for token in continuation.latest:
        text.add(token, request.stop)
    if continuation.error and not text.cut.ended:
        if not isinstance(continuation.cause, InputError):
            continuation.raise_cause()
        return {"error": continuation.error}
    if continuation.end:
        text.end()
    if not text.cut.ended:
        return None
    engine.cancel(continuation)
    return {"text": text.written, "tokens": len(text.tokens)}


def _in_batches(
    tokenizer: Tokenizer,
    executor: Decoder,
    request: Request,
    stops: Sequence[str],
    batch: int,
    prompts: Mapping[int, Sequence[int]],
) -> Iterator[tuple[int, Row]]:
    """On ranks, and for models that process a whole text for each token."""
    from moec.runtime.text.write_text import new_texts, write

    indices = list(prompts)
    for start in range(0, len(indices), batch):
        part = indices[start : start + batch]
        texts = new_texts(tokenizer, [prompts[index] for index in part], stops)
        try:
            for _ in write(executor, texts, replace(request, streams=tuple(part))):
                pass
        except InputError as error:
            yield from ((index, {"error": str(error)}) for index in part)
            continue
        for index, text in zip(part, texts, strict=True):
            yield index, {"text": text.written, "tokens": len(text.tokens)}
