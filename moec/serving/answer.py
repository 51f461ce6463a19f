"""The answer to one request: its texts as they are computed, and the objects that hold them."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from starlette.concurrency import run_in_threadpool

from moec.errors import first_line
from moec.runtime.text.calls import CallReader
from moec.runtime.text.engine import LENGTH, STOP
from moec.runtime.text.sampling import Logprobs
from moec.runtime.text.write_text import Text, new_texts
from moec.serving.errors import ApiError
from moec.serving.fields import Fields
from moec.serving.service import Service
from moec.serving.tools import shown_call
from moec.serving.worker import LOGGER, Ticket, Update

LEAST = -9999.0  # of a token without probability, as JSON has no infinity

Bytes = Callable[[int], bytes]
"""The bytes of a token."""


@dataclass(frozen=True)
class Score:
    """A token of a text, and where it begins, in characters."""

    token: int
    logprobs: Logprobs | None  # None: of the first token of a prompt
    offset: int


def of_chat(scores: Sequence[Score], bytes_of: Bytes) -> dict[str, Any]:
    content = []
    for score in scores:
        assert score.logprobs is not None  # chats are not echoed
        chosen = _token(score.token, score.logprobs.logprob, bytes_of)
        top = [_token(token, logprob, bytes_of) for token, logprob in score.logprobs.top]
        content.append({**chosen, "top_logprobs": top})
    return {"content": content, "refusal": None}


def of_completion(scores: Sequence[Score], bytes_of: Bytes) -> dict[str, Any]:
    """Of likeliest tokens with the same text, which bytes alone would tell apart, the first."""
    return {
        "tokens": [_text(bytes_of(score.token)) for score in scores],
        "token_logprobs": [s.logprobs and max(s.logprobs.logprob, LEAST) for s in scores],
        "top_logprobs": [
            s.logprobs and {_text(bytes_of(t)): max(p, LEAST) for t, p in reversed(s.logprobs.top)}
            for s in scores
        ],
        "text_offset": [score.offset for score in scores],
    }


def _token(token: int, logprob: float, bytes_of: Bytes) -> dict[str, Any]:
    content = bytes_of(token)
    return {"token": _text(content), "logprob": max(logprob, LEAST), "bytes": [*content]}


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


PING_SECONDS = 15.0


@dataclass(eq=False)
class Choice:
    """One text of an answer. `end` is its finish reason, empty until it has one; `first` is the
    time of its first token, `scores` have the tokens since the last chunk of a stream, `total` is
    the sum of the log probabilities of all. `reader` separates `calls` of functions from the
    `content`. `echo` is the decoder of a prompt that is shown, `echoed` the number of its
    characters; `dropped`: the text has no others."""

    ticket: Ticket
    text: Text
    reader: CallReader | None = None
    most_calls: int | None = None
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0
    end: str = ""
    first: float = 0.0
    scores: list[Score] = field(default_factory=list)
    total: float = 0.0
    index: int = 0
    echo: Callable[[int], str] | None = None
    echoed: int = 0
    dropped: bool = False

    def add(self, update: Update) -> str:
        """The characters that become certain. Raises ApiError where the text failed."""
        if update.error is not None:
            raise update.error
        shown = self._echoed() if self.count == 0 else ""
        self.count += 1
        if self.dropped:
            self.end, self.content = LENGTH, shown
            return shown
        stop, offset = self.ticket.request.stop, len(self.text.written) + len(self.text.cut.held)
        self.total += update.logprobs.logprob if update.logprobs else 0.0
        if update.logprobs and update.token is not None and update.token not in stop:
            self.scores.append(Score(update.token, update.logprobs, self.echoed + offset))
        piece = shown + self.text.add(update.token, stop)
        self.end = STOP if self.text.cut.ended else update.end
        piece += self.text.end() if self.end else ""
        if self.reader is not None:
            piece, calls = self.reader.feed(piece, ended=bool(self.end))
            self.calls = [*self.calls, *map(shown_call, calls)][: self.most_calls]
        self.content += piece
        return piece

    def _echoed(self) -> str:
        """The text of the prompt, and the scores of its tokens where they are computed."""
        text = self.ticket.text
        if self.echo is None or text is None:
            return ""
        shown, scores = "", [None, *text.prompt_logprobs]
        for token, score in itertools.zip_longest(text.prompt, scores):
            if self.ticket.request.scores_prompt:
                self.scores.append(Score(token, score, len(shown)))
            shown += self.echo(token)
        self.echoed = len(shown)
        return shown

    @property
    def finish_reason(self) -> str | None:
        return "tool_calls" if self.calls and self.end == STOP else self.end or None


Piece: TypeAlias = tuple[Choice, str, bool, list[dict[str, Any]]]


class Answer:
    """Once it has begun, it holds the places of its texts in the queue until it is closed."""

    def __init__(self, service: Service, fields: Fields, chat: bool) -> None:
        """Takes time that grows with the request. Raises ApiError where a field is wrong."""
        self._use = use = service.tool_use(fields)
        prompts, guide = service.tokens(fields, use), service.guide(fields, use)
        self._fields, self._service, self._chat = fields, service, chat
        self._start, self._closed = time.perf_counter(), False
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._choices: list[Choice] = []
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model,
            "system_fingerprint": service.fingerprint,
        }
        self._prompt_tokens = sum(map(len, prompts))
        for prompt in prompts:
            request = service.request(prompt, fields, guide)
            for number in range(fields.best_of or fields.n):
                ticket = Ticket(prompt, request, number, len(self._choices), self._updates)
                self._choices.append(self._choice(ticket))

    def _choice(self, ticket: Ticket) -> Choice:
        fields, use, tokenizer = self._fields, self._use, self._service.tokenizer
        stops, special = fields.stops, False
        if use is not None:
            stops, special = (*stops, *use.stops), use.special
        (text,) = new_texts(tokenizer, [ticket.prompt], stops, special)
        if use is not None:
            return Choice(
                ticket, text, use.reader(), None if use.parallel else 1, index=ticket.index
            )
        echo = tokenizer.decoder([], False) if fields.echo else None
        return Choice(ticket, text, index=ticket.index, echo=echo, dropped=fields.max_tokens == 0)

    def begin(self) -> None:
        """Let the texts be computed, for which there are places."""
        for choice in self._choices:
            self._service.worker.submit(choice.ticket)

    def close(self, reason: str = "abort") -> None:
        """Cancel what has not ended, and give the places in the queue back."""
        if self._closed:
            return
        self._closed = True
        self._service.used -= len(self._choices)
        for choice in self._choices:
            if not choice.end:
                self._service.worker.cancel(choice.ticket)
                self._service.metrics.ended(reason)
                LOGGER.info("%s: text %d: %s", self._head["id"], choice.ticket.index, reason)

    async def complete(self) -> bytes:
        """The JSON of an answer that is not streamed. Raises ApiError where a text fails."""
        try:
            async for _ in self._pieces():
                pass
            return await run_in_threadpool(self._full_body)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> ApiError:
        """What a client is told of an error of any class, which is logged and counted."""
        if isinstance(error, ApiError):
            return error
        self._service.metrics.failed(error)
        LOGGER.error("%s: the answer cannot be written", self._head["id"], exc_info=error)
        return ApiError(500, f"{type(error).__name__}: {first_line(error)}")

    def _full_body(self) -> bytes:
        choices = []
        for choice in self._best():
            text = choice.content
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if choice.calls:
                message |= {"content": text or None, "tool_calls": choice.calls}
            content = {"message": message} if self._chat else {"text": text}
            choices.append(self._content(choice, content, choice.finish_reason))
        return _json(self._object(choices, usage=self._usage)).encode()

    def _best(self) -> list[Choice]:
        """The `n` choices of each prompt with the greatest mean log probabilities, best first."""
        fields, every = self._fields, self._choices
        if fields.best_of is None:
            return every
        best = []
        for start in range(0, len(every), fields.best_of):
            of_prompt = every[start : start + fields.best_of]
            of_prompt.sort(key=lambda choice: -choice.total / choice.count)
            best += of_prompt[: fields.n]
        for index, choice in enumerate(best):
            choice.index = index
        return best

    async def events(self) -> AsyncIterator[str]:
        """The events of an answer that is streamed. An error ends them without [DONE]."""
        includes = self._fields.stream_options and self._fields.stream_options.include_usage
        usage = {"usage": None} if includes else {}
        try:
            async for item in self._pieces():
                if item is None:
                    yield ": ping\n\n"
                    continue
                for chunk in self._chunks(*item):
                    yield _event(self._object([chunk], ".chunk", **usage))
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            self.close("error")
            yield _event(self._failure(error).body)
            return
        if includes:
            yield _event(self._object([], ".chunk", usage=self._usage))
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[Piece | None]:
        """Each piece of a text, with whether it is the first, and its new calls of functions; None
        where nothing came for long."""
        while not all(choice.end for choice in self._choices):
            try:
                update = await asyncio.wait_for(self._updates.get(), PING_SECONDS)
            except TimeoutError:
                yield None
                continue
            choice = self._choices[update.index]
            if choice.end:  # a token that was computed before a string cut the text
                continue
            called = len(choice.calls)
            if choice.echo and choice.count == 0:  # takes the longer, the longer the prompt is
                piece = await run_in_threadpool(choice.add, update)
            else:
                piece = choice.add(update)
            first = choice.count == 1
            self._observe(choice)
            calls = enumerate(choice.calls[called:], called)
            new = [{"index": number, **call} for number, call in calls]
            if piece or new or first or choice.end or choice.scores:
                yield choice, piece, first, new

    def _observe(self, choice: Choice) -> None:
        metrics, now = self._service.metrics, time.perf_counter()
        if choice.count == 1:
            choice.first = now
            metrics.first_token.observe(now - self._start)
        if choice.end:
            self._service.worker.cancel(choice.ticket)  # or it goes on where a string cut it
            metrics.ended(choice.end)
            metrics.latency.observe(now - self._start)
            if choice.count > 1:
                metrics.per_token.observe((now - choice.first) / (choice.count - 1))

    @property
    def _usage(self) -> dict[str, Any]:
        """`cached_tokens` are those of the first text of each prompt, which is counted once."""
        read, count = self._prompt_tokens, sum(c.count for c in self._choices if not c.dropped)
        texts = [choice.ticket.text for choice in self._choices if choice.ticket.choice == 0]
        reused = sum(text.reused for text in texts if text is not None)
        return {
            "prompt_tokens": read,
            "completion_tokens": count,
            "total_tokens": read + count,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _object(self, choices: list[Any], suffix: str = "", **usage: Any) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **usage}

    def _chunks(
        self, choice: Choice, piece: str, first: bool, calls: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The choices of the chunks for a piece: in a chat, role, content, calls and end each have
        one."""
        end = choice.finish_reason
        if not self._chat:
            return [self._content(choice, {"text": piece}, end)]
        chunks = []
        if first:
            chunks.append(_choice(choice, {"delta": {"role": "assistant", "content": ""}}))
        if piece or choice.scores:
            chunks.append(self._content(choice, {"delta": {"content": piece}}, None))
        if calls:
            chunks.append(_choice(choice, {"delta": {"tool_calls": [*calls]}}))
        return [*chunks, _choice(choice, {"delta": {}}, end)] if end else chunks

    def _content(self, choice: Choice, content: dict[str, Any], end: str | None) -> dict[str, Any]:
        """A choice with content, and the log probabilities of its tokens, which are used up."""
        scores, choice.scores = choice.scores, []
        if self._fields.scores is None:
            return _choice(choice, content, end)
        shown = of_chat if self._chat else of_completion
        return _choice(choice, content, end, shown(scores, self._service.tokenizer.bytes_of))


def _choice(
    choice: Choice, content: dict[str, Any], end: str | None = None, scores: Any = None
) -> dict[str, Any]:
    return {"index": choice.index, **content, "logprobs": scores, "finish_reason": end}


def _event(content: dict[str, Any]) -> str:
    return f"data: {_json(content)}\n\n"


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
