"""Continuous batching: texts join and leave between the steps of one model.

All texts are slots of one set of caches, the texts that decode the first n of them, so that the
function `decode` runs on the first n rows. A step is at most one chunk of the prompt of one text,
in caches of that text alone, and one token of every text that decodes. The bits of a text do not
depend on the others: its prompt is processed in the chunks of `Texts`, and every row of `decode`
is computed as if it were alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moec.errors import InputError
from moec.runtime.call.caches import Cache, copy_tokens, first_texts
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE, carries
from moec.runtime.text.generate import Request
from moec.runtime.text.sampling import Logprobs, Sampler, logprobs
from moec.runtime.text.texts import PIECE, Decoder

STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"


@dataclass(eq=False)
class Continuation:
    """One prompt and its new `tokens`.

    `end` is empty until it is STOP (the last token is one of `request.stop`), LENGTH, CANCELLED, or
    FAILED, with the sentence `error`. `logprobs` has an item for each token where they were
    requested.
    """

    prompt: Sequence[int]
    request: Request
    sampler: Sampler
    number: Array  # i32[1], which identifies it in traces
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    read: int = 0  # how many tokens of the prompt are in its caches
    end: str = ""
    error: str = ""

    @property
    def cached(self) -> int:
        """The number of tokens in its caches: all but the latest."""
        return self.read + max(0, len(self.tokens) - 1)


@dataclass(frozen=True, eq=False)
class StepResult:
    """What one step did: the texts with one more token, and the tokens of prompts it processed."""

    advanced: tuple[Continuation, ...]
    prompt_tokens: int


class Engine:
    """Continues texts, at most `slots` at a time, of at most `room` tokens each, prompt and new
    tokens. Not safe to call from several threads.

    `piece` is the most tokens of a prompt that a step processes: between two tokens of a text is
    the time of one such chunk.
    """

    def __init__(self, executor: Decoder, slots: int, room: int, piece: int = PIECE) -> None:
        """Raises InputError where the model has no `decode`, or `room` exceeds its limit."""
        package = executor.package
        if package.generation is None:
            raise InputError(f"texts cannot be batched continuously: {package.no_generation}")
        longest = package.generation.longest
        if room < 1 or slots < 1 or (longest is not None and room > longest):
            limit = "any number of" if longest is None else f"at most {longest}"
            raise InputError(
                f"{slots} slots of {room} tokens: there must be at least one of each, and the "
                f"model takes {limit} tokens"
            )
        self.slots, self.room = slots, room
        self.waiting: deque[Continuation] = deque()
        self.decoding: list[Continuation] = []  # by slot
        self.vocabulary = package.generation.vocabulary
        self._ports = package.functions[DECODE].caches
        self._carries = carries(package.functions[DECODE])
        self._executor, self._piece = executor, piece
        self._caches = executor.new_caches(slots, room)
        self._views: dict[int, list[Cache]] = {}  # the caches of the first n texts
        self._joining: tuple[Continuation, list[Cache]] | None = None

    @property
    def running(self) -> int:
        """The number of texts that hold a slot."""
        return len(self.decoding) + (self._joining is not None)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def cached(self) -> int:
        """The number of tokens in all caches."""
        joining = self._joining[0].cached if self._joining else 0
        return joining + sum(text.cached for text in self.decoding)

    def check(self, prompt: Sequence[int], request: Request) -> None:
        """Raises InputError for a prompt that cannot be continued as requested."""
        most = request.most
        if not len(prompt):
            raise InputError("the prompt has no tokens; give at least one")
        if len(prompt) + most > self.room:
            raise InputError(
                f"the prompt has {len(prompt)} tokens and {most} more may follow, and a text has "
                f"at most {self.room}: shorten one of them"
            )
        biased = [token for token, _ in request.sampling.logit_bias]
        low, high = min((*prompt, *biased)), max((*prompt, *biased))
        if low < 0 or high >= self.vocabulary:
            raise InputError(
                f"token {low if low < 0 else high} is not one of the model's "
                f"{self.vocabulary} tokens"
            )

    def submit(self, prompt: Sequence[int], request: Request, index: int = 0) -> Continuation:
        """Append a text to those that wait for a slot; once it is here it is always continued.
        `index` selects one of the streams of random numbers of a seed, as for a text of a batch.

        Raises InputError as `check`.
        """
        self.check(prompt, request)
        sampler = Sampler(request.sampling, prompt, index)
        number = self._executor.number_requests(1)
        text = Continuation(tuple(prompt), request, sampler, number)
        self.waiting.append(text)
        return text

    def cancel(self, text: Continuation) -> None:
        """End a text now, and free its slot; does nothing where it has ended."""
        if not text.end:
            text.end = CANCELLED
            self._release(text)

    def fail(self, error: str) -> tuple[Continuation, ...]:
        """End all texts that hold a slot, with a sentence, after a step that raised an error."""
        joining = (self._joining[0],) if self._joining else ()
        failed = (*self.decoding, *joining)
        for text in failed:
            text.end, text.error = FAILED, error
        self.decoding, self._joining = [], None
        return failed

    def step(self) -> StepResult:
        """One token of every text that decodes, and a chunk of a prompt. The texts that ended in it
        have left their slots."""
        advanced = self._decode() if self.decoding else []
        if self._joining is None and self.waiting and len(self.decoding) < self.slots:
            self._joining = self.waiting.popleft(), self._executor.new_caches(1, self.room)
        if self._joining is None:
            return StepResult(tuple(advanced), 0)
        text, caches = self._joining
        before = text.read
        row = self._read(text, caches)
        if text.read == len(text.prompt):
            self._joining = None
            advanced.append(text)
            _draw(text, row)
            if not text.end:
                self._copy(caches, 0, len(self.decoding), text.cached)
                self.decoding.append(text)
        return StepResult(tuple(advanced), text.read - before)

    def _decode(self) -> list[Continuation]:
        texts = list(self.decoding)
        count = len(texts)
        if count not in self._views:
            self._views[count] = first_texts(self._caches, count)
        tokens = np.array([[text.tokens[-1]] for text in texts], np.int64)
        first = np.array([text.cached for text in texts], np.int64)
        logits = self._executor.decode(
            [tokens, first, np.arange(count), first],
            self._views[count],
            np.concatenate([text.number for text in texts]),
            np.ones(count, np.int64),
        )
        for text, row in zip(texts, logits, strict=True):
            _draw(text, row)
        for text in texts:
            if text.end:
                self._release(text)
        return texts

    def _read(self, text: Continuation, caches: list[Cache]) -> Array:
        """The logits f32[V] after the next chunk of a prompt.

        Chunks are those of `Texts`: the short one is the first, padded to the size of the others,
        because kernels for a few rows round differently; a recurrent state forbids padding, and the
        short one is the last.
        """
        start, most = text.read, self._piece
        left, padding = len(text.prompt) - start, 0
        size = min(left, most) if self._carries else left % most or most
        if len(text.prompt) > most and not self._carries:
            padding = most - size
        tokens = np.zeros((1, size + padding), np.int64)
        tokens[0, :size] = text.prompt[start : start + size]
        counts = [np.array([n], np.int64) for n in (start, size - 1, start + size - 1, size)]
        text.read += size
        logits = self._executor.decode([tokens, *counts[:3]], caches, text.number, counts[3])
        row: Array = logits[0]
        return row

    def _release(self, text: Continuation) -> None:
        """Take a text out; the text in the last slot moves to its slot."""
        if text in self.decoding:
            slot, last = self.decoding.index(text), self.decoding.pop()
            if last is not text:
                self._copy(self._caches, len(self.decoding), slot, last.cached)
                self.decoding[slot] = last
        elif self._joining is not None and self._joining[0] is text:
            self._joining = None
        elif text in self.waiting:
            self.waiting.remove(text)

    def _copy(self, source: Sequence[Cache], text: int, slot: int, tokens: int) -> None:
        for port, old, new in zip(self._ports, source, self._caches, strict=True):
            copy_tokens(port, old, text, new, slot, tokens)


def _draw(text: Continuation, logits: Array) -> None:
    """Add the next token, from logits f32[V], and set `end` where it is the last."""
    if np.isnan(logits).any():
        text.end = FAILED
        text.error = (
            f"the logits hold NaN after {len(text.prompt) + len(text.tokens)} tokens: no next "
            "token can be chosen"
        )
        return
    request = text.request
    token = text.sampler.draw(logits, request.stop if len(text.tokens) < request.least else ())
    text.tokens.append(token)
    if request.logprobs is not None:
        text.logprobs.append(logprobs(logits, token, request.logprobs))
    if token in request.stop:
        text.end = STOP
    elif len(text.tokens) == request.most:
        text.end = LENGTH
