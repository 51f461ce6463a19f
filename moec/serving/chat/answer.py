"""A chat and its answers, each of which continues all messages before it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moec.errors import InputError
from moec.report.units import counted
from moec.runtime.text.engine import FAILED, LENGTH, Engine
from moec.runtime.text.prompt import Tokenizer
from moec.runtime.text.request import Request
from moec.runtime.text.write_text import new_texts


@dataclass(frozen=True)
class AnswerStats:
    """The numbers of an answer: its tokens, those of the chat before it, of which some were
    processed and the others were in a cache, and the seconds to the first token and to the last.
    `end` says why it ended, where that was not the model."""

    tokens: int
    prompt: int
    processed: int
    first: float
    seconds: float
    end: str

    def line(self) -> str:
        """The answer in numbers, for people."""
        rate = (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else 0.0
        speed = f" at {rate:.1f}/s" if rate else ""  # one token is no time between two
        return (
            f"{counted(self.tokens, 'token')}{speed}, the first after {self.first:.2f} s, "
            f"{self.processed} of {self.prompt} prompt tokens processed{self.end}"
        )


@dataclass
class Chat:
    """The messages so far, and how the next answer is computed. `answers` counts them, also those
    that were replaced: each has its stream of random numbers."""

    engine: Engine
    tokenizer: Tokenizer
    request: Request
    stops: tuple[str, ...] = ()
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0

    @property
    def open(self) -> bool:
        """Whether the last message is to be answered."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def answer(
        self, show: Callable[[str], object], interrupted: Callable[[], bool] = lambda: False
    ) -> AnswerStats:
        """Append an answer to the messages, and show its pieces as they come. It ends before the
        next token where it is `interrupted`.

        Raises InputError where the messages do not fit, and as `Engine.step` and the template.
        """
        prompt, engine = self.tokenizer.chat(self.messages), self.engine
        room = engine.room - len(prompt)
        if room < 1:
            raise InputError(
                f"the chat has {len(prompt)} tokens, and a text has at most {engine.room}: /clear "
                "begins a new chat, --context N allows more where the model does"
            )
        (text,) = new_texts(self.tokenizer, [prompt], self.stops)
        start, first, processed = time.perf_counter(), 0.0, 0
        request = replace(self.request, most=min(self.request.most, room))
        continuation = engine.submit(prompt, request, self.answers)
        self.answers += 1
        try:
            while not (text.cut.ended or continuation.end or interrupted()):
                step = engine.step()
                processed += step.prompt_tokens
                if continuation.end == FAILED:
                    continuation.raise_cause()
                if step.advanced:
                    first = first or time.perf_counter() - start
                    for token in continuation.latest:
                        show(text.add(token, request.stop))
        finally:
            engine.cancel(continuation)
        seconds, end = time.perf_counter() - start, ""
        if continuation.end == LENGTH:
            full = "; the context is full: /clear begins a new chat"
            end = full if request.most == room else "; cut by --max-new-tokens"
        elif not text.cut.ended:
            end = "; stopped"
        show(text.end())
        self.add("assistant", text.written)
        return AnswerStats(len(text.tokens), len(prompt), processed, first, seconds, end)
