"""Continuous batching: texts join and leave between the steps of one model.

All texts are slots of one set of caches, the texts that decode the first n of them, so that the
function `decode` runs on the first n rows. A step is at most one call for prompts and one token of
every text that decodes. The bits of a text do not depend on the others, nor on how its prompt is
cut, nor on whether the beginning of its prompt was known, nor on whether tokens were verified
together: kernels compute every row as if it were alone, and round the same for up to 8 rows of
a text, and for any number of at least ROWS. Shorter prompts are read in one call, of as many
rows.

Tokens are verified by drawing: where a text has guesses, the rows of a call are its last token and
they, and tokens are drawn from the logits in turn, as without guesses, until one is not the guess.
The cache entries of wrong guesses are overwritten by the tokens that follow.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Never

import numpy as np

from moec.errors import InputError, MoecError, UsageError, first_line
from moec.runtime.call.caches import Cache, copy_tokens, first_texts
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE, carries
from moec.runtime.text.prefixes import Prefixes
from moec.runtime.text.request import Request
from moec.runtime.text.sampler import Sampler
from moec.runtime.text.sampling import Logprobs, logprobs
from moec.runtime.text.speculation.draft import DraftGuesses, Guesses
from moec.runtime.text.texts import PIECE, ROWS, Decoder, fit_together

STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"
INTERRUPTS = (KeyboardInterrupt, SystemExit)


@dataclass(eq=False)
class Continuation:
    """One prompt and its new `tokens`.

    `end` is empty until it is STOP (the last token is one of `request.stop`, or completes its
    grammar), LENGTH, CANCELLED, or FAILED, with the sentence `error` and its `cause`. `logprobs`
    has an item for each token where they were requested, `prompt_logprobs` for each of the prompt
    but the first.
    The first `reused` tokens of the prompt were not computed for it. `new` is how many of `tokens`
    the latest step added.
    """

    prompt: Sequence[int]
    request: Request
    sampler: Sampler
    number: Array  # i32[1], which identifies it in traces
    guesses: Guesses | DraftGuesses
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    reused: int = 0
    read: int = 0  # how many tokens of the prompt are in its caches
    end: str = ""
    error: str = ""
    cause: BaseException | None = None
    new: int = 0

    def fail(self, cause: BaseException) -> None:
        """End with what was raised, of any class; what interrupts the main thread is raised on."""
        if isinstance(cause, INTERRUPTS) and threading.current_thread() is threading.main_thread():
            raise cause
        name = "" if isinstance(cause, MoecError) else f"{type(cause).__name__}: "
        self.end, self.cause = FAILED, cause
        count = len(self.prompt) + len(self.tokens)
        self.error = f"after {count} tokens: {name}{first_line(cause)}"

    def raise_cause(self) -> Never:
        """Raises the cause; an InputError says after how many tokens."""
        assert self.cause is not None
        raise InputError(self.error) if isinstance(self.cause, InputError) else self.cause

    @property
    def latest(self) -> list[int]:
        """The tokens that the latest step added."""
        return self.tokens[len(self.tokens) - self.new :]

    @property
    def cached(self) -> int:
        """The number of tokens in its caches: all but the latest."""
        return self.read + max(0, len(self.tokens) - 1)

    @property
    def left(self) -> int:
        """The number of tokens of the prompt that are not in its caches."""
        return len(self.prompt) - self.read


@dataclass(frozen=True, eq=False)
class StepResult:
    """What one step did: the texts with `new` tokens, or an error; the tokens of prompts it
    processed, those that were known for the prompt that it began with; and the tokens that were
    guessed, and those that were drawn of them."""

    advanced: tuple[Continuation, ...]
    prompt_tokens: int = 0
    reused_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(text.new for text in self.advanced)


class Engine:
    """Continues texts, at most `slots` at a time, of at most `room` tokens each, prompt and new
    tokens but the last. Not safe to call from several threads.

    `piece` is the most tokens of prompts that a step processes: between two tokens of a text is the
    time of one such call. With `prompts_first` no token is decoded while prompts wait for a free
    slot, which takes fewer steps in all. The keys and values of `prefix_tokens` tokens of prompts
    are stored, and used for prompts that begin alike; a model with recurrent states has none.

    What a text's sampler or grammar raises ends that text, what a call of the model raises the
    texts in it; `failed_calls` is how many of them failed in a row.
    """

    def __init__(
        self,
        executor: Decoder,
        slots: int,
        room: int,
        piece: int = PIECE,
        prompts_first: bool = False,
        prefix_tokens: int = 0,
    ) -> None:
        """Raises InputError where the model has no `decode`, UsageError where `room` exceeds its
        limit."""
        package = executor.package
        if package.generation is None:
            raise InputError(f"texts cannot be batched continuously: {package.no_generation}")
        longest = package.generation.longest
        if room < 1 or slots < 1 or (longest is not None and room > longest):
            limit = "any number of" if longest is None else f"at most {longest}"
            raise UsageError(
                f"{slots} slots of {room} tokens: there must be at least one of each, and the "
                f"model takes {limit} tokens"
            )
        if piece < 2 * ROWS:
            raise InputError(f"a step processes {piece} tokens of a prompt: at least {2 * ROWS}")
        self.slots, self.room = slots, room
        self.waiting: deque[Continuation] = deque()
        self.decoding: list[Continuation] = []  # by slot
        self.vocabulary = package.generation.vocabulary
        self._ports = package.functions[DECODE].caches
        self._carries = carries(package.functions[DECODE])
        self._account = None if self._carries else executor.account
        self._executor, self._piece, self._prompts_first = executor, piece, prompts_first
        self._caches = executor.new_caches(slots, room)
        self._views: dict[int, list[Cache]] = {}  # the caches of the first n texts
        self.failed_calls = 0
        self._joining: list[Continuation] = []
        self._joining_caches: list[Cache] = []
        self._prefixes: Prefixes | None = None
        if prefix_tokens and not self._carries:
            self._prefixes = Prefixes(executor, self._ports, prefix_tokens)

    @property
    def running(self) -> int:
        """The number of texts that hold a slot."""
        return len(self.decoding) + len(self._joining)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def cached(self) -> int:
        """The number of tokens in all caches."""
        return sum(text.cached for text in (*self.decoding, *self._joining))

    def check(self, prompt: Sequence[int], request: Request) -> None:
        """Raises InputError for a prompt that cannot be continued as requested."""
        if not len(prompt):
            raise InputError("the prompt has no tokens; give at least one")
        if len(prompt) + request.most - 1 > self.room:
            raise InputError(
                f"the prompt has {len(prompt)} tokens and {request.most} more may follow, and a "
                f"text has at most {self.room}: shorten one of them"
            )
        request.check_ids(prompt, self.vocabulary)
        if (request.guesses or request.draft is not None) and self._account is None:
            why = "has recurrent states, which cannot go back" if self._carries else "is on a GPU"
            what = "a draft was given" if request.draft else f"speculate is {request.guesses}"
            raise InputError(f"{what}, and the model {why}: leave it out")

    def submit(self, prompt: Sequence[int], request: Request, index: int = 0) -> Continuation:
        """Append a text to those that wait for a slot; once it is here it is always continued.
        `index` selects one of the streams of random numbers of a seed, as for a text of a batch.

        Raises InputError as `check`.
        """
        self.check(prompt, request)
        number = self._executor.number_requests(1)
        sampler = Sampler(request, prompt, index)
        count = 0 if self._account is None else request.guesses
        guesses = (
            Guesses(prompt, count)
            if request.draft is None
            else request.draft.guesses(prompt, count, self.room)
        )
        text = Continuation(tuple(prompt), request, sampler, number, guesses)
        self.waiting.append(text)
        return text

    def cancel(self, text: Continuation) -> None:
        """End a text now, and free its slot; does nothing where it has ended."""
        if not text.end:
            text.end = CANCELLED
            self._release(text)

    def fail(
        self, cause: BaseException, texts: Sequence[Continuation] = ()
    ) -> Sequence[Continuation]:
        """End texts with what was raised, and return them: all that decode, all that join, or by
        default whatever holds a slot, else what waits."""
        texts = texts or (*self.decoding, *self._joining) or (*self.waiting,)
        for text in texts:
            if not text.end:
                text.new = 0
                text.fail(cause)
        self.decoding = [text for text in self.decoding if text not in texts]
        self._joining = [text for text in self._joining if text not in texts]
        self.waiting = deque(text for text in self.waiting if text not in texts)
        self.failed_calls += 1
        return texts

    def step(self) -> StepResult:
        """A token of every text that decodes, or several, and a part of a prompt, or several short
        prompts. The texts that ended in it have left their slots."""
        prompts_wait = self._joining or (self.waiting and len(self.decoding) < self.slots)
        advanced: list[Continuation] = []
        joining: list[Continuation] = []
        guessed = accepted = reused = count = 0
        if self.decoding and not (self._prompts_first and prompts_wait):
            advanced = [*self.decoding]
            try:
                guessed, accepted = self._decode(advanced)
            except BaseException as error:
                self.fail(error, advanced)
        try:
            if not self._joining and self.waiting and len(self.decoding) < self.slots:
                reused = self._join()
            joining = self._joining
            if joining:
                before = sum(text.read for text in joining)
                rows = self._read()
                count = sum(text.read for text in joining) - before
                if not joining[0].left:
                    self._joined(rows)
                    advanced += joining
        except BaseException as error:
            joining = joining or self._joining
            advanced += self.fail(error, joining)
        return StepResult(tuple(advanced), count, reused, guessed, accepted)

    def _decode(self, texts: Sequence[Continuation]) -> tuple[int, int]:
        """Draw the next tokens of all texts that decode. Returns how many were guessed, and drawn
        of these."""
        account, guesses = self._account, self._guesses(texts)
        count, rows = len(texts), 1 + max(map(len, guesses))
        tokens = np.zeros((count, rows), np.int64)  # rows after a text's guesses are not drawn from
        for row, text, guessed in zip(tokens, texts, guesses, strict=True):
            row[: 1 + len(guessed)] = [text.tokens[-1], *guessed]
        first = np.array([text.cached for text in texts], np.int64)
        start = time.perf_counter()
        logits = self._executor.decode(
            [tokens, first, np.arange(count * rows).reshape(count, rows), first],
            self._first(count),
            np.concatenate([text.number for text in texts]),
            np.full(count, rows),
        )
        seconds, self.failed_calls = time.perf_counter() - start, 0
        for text, guessed, scores in zip(texts, guesses, logits, strict=True):
            text.new = 0
            for row, guess in zip(scores, [*guessed, None], strict=False):
                _draw(text, row)
                if text.end or text.tokens[-1] != guess:
                    break
        for text in texts:
            if text.end:
                self._release(text)
        verified = sum(map(len, guesses))
        accepted = sum(max(0, text.new - 1) for text in texts)
        if account is not None:
            account.add(count, rows, seconds, verified, accepted)
        return verified, accepted

    def _guesses(self, texts: Sequence[Continuation]) -> list[list[int]]:
        """The guesses of each text that the next call verifies."""
        account, none = self._account, list[list[int]]([] for _ in texts)
        if account is None or account.paused:
            return none
        chances = [(text.guesses.count, text.guesses.chance) for text in texts]
        requested = max(
            min(text.guesses.requested, n) for text, (n, _) in zip(texts, chances, strict=True)
        )
        drafts = {text.request.draft for text in texts} - {None}
        cost = max((draft.seconds for draft in drafts if draft is not None), default=0.0)
        if (rows := max(account.rows(chances, cost), 1 + requested)) == 1:
            return none
        most = max(1, self._piece // len(texts))  # tokens of all texts bound the memory of a call
        rows = min(rows, most, *(self.room - text.cached for text in texts))
        left = (text.request.most - len(text.tokens) for text in texts)
        return [text.guesses.next(min(rows, n) - 1) for text, n in zip(texts, left, strict=True)]

    def _first(self, count: int) -> list[Cache]:
        if count not in self._views:
            self._views[count] = first_texts(self._caches, count)
        return self._views[count]

    def _join(self) -> int:
        """Take the text that waits longest, and short ones that one call can process with it.
        Returns the number of its tokens that were known."""
        text = self.waiting.popleft()
        self._joining = [text]
        if self._prefixes is None and not text.request.scores_prompt:
            for other in [*self.waiting]:
                if self.running < self.slots and self._fits(other):
                    self.waiting.remove(other)
                    self._joining.append(other)
        # Where none decodes, the first slots are free, and the prompts are read into them; but
        # recurrent states must be new.
        count, new = len(self._joining), self._executor.new_caches
        in_place = not self.decoding and not self._carries
        self._joining_caches = self._first(count) if in_place else new(count, self.room)
        if self._prefixes is not None and not text.request.scores_prompt:
            most = max(0, len(text.prompt) - ROWS)  # so that at least ROWS are read
            text.reused = text.read = self._prefixes.load(text.prompt, most, self._joining_caches)
        return text.reused

    def _fits(self, text: Continuation) -> bool:
        """Whether one call can process a prompt with those that join, with little padding."""
        if text.request.scores_prompt:
            return False
        sizes = [len(other.prompt) for other in (*self._joining, text)]
        if max(sizes) * len(sizes) > self._piece or max(sizes) > self.room:
            return False
        return fit_together(sizes, self._carries)

    def _read(self) -> Array:
        """The logits f32[texts, V] after the next part of the prompts that join."""
        texts, left = self._joining, self._joining[0].left
        columns, scored = max(text.left for text in texts), texts[0].request.scores_prompt
        # Logits of all tokens take much memory.
        piece = 2 * ROWS if scored and not self._carries else self._piece
        if left > piece:  # then it joins alone; the last part has at least ROWS
            columns = piece - ROWS * (left - piece < ROWS)
        tokens = np.zeros((len(texts), columns), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            part = text.prompt[text.read : text.read + columns]
            row[: len(part)] = part
        first = np.array([text.read for text in texts], np.int64)
        lengths = np.array([min(text.left, columns) for text in texts], np.int64)
        rows = (np.arange(len(texts)) * columns + lengths - 1)[:, None]
        numbers = np.concatenate([text.number for text in texts])
        calls = [rows]
        if scored:  # the last row has other bits alone, with which a text goes on
            every = np.arange(columns)[None]
            calls = [every] if self._carries or columns < left else [every, rows]
        for rows in calls:
            counts = [tokens, first, rows, first + lengths - rows.shape[1]]
            logits = self._executor.decode(counts, self._joining_caches, numbers, lengths)
            self.failed_calls = 0
            if rows.shape[1] > 1:
                text, top = texts[0], texts[0].request.logprobs or 0
                pairs = zip(logits[0], text.prompt[text.read + 1 :], strict=False)
                text.prompt_logprobs += (logprobs(row, token, top) for row, token in pairs)
        for text, length in zip(texts, lengths.tolist(), strict=True):
            text.read += length
        return logits[:, -1]

    def _joined(self, logits: Array) -> None:
        """Draw the first tokens of texts whose prompts are read, and let them decode."""
        texts, caches = self._joining, self._joining_caches
        self._joining, in_place = [], caches is self._views.get(len(texts))
        if self._prefixes is not None:
            self._prefixes.add(texts[0].prompt, caches, 0)
        for number, (text, row) in enumerate(zip(texts, logits, strict=True)):
            _draw(text, row)
            if text.end:
                continue
            slot = len(self.decoding)
            if not in_place or slot != number:
                self._copy(caches, number, slot, text.cached)
            self.decoding.append(text)

    def _release(self, text: Continuation) -> None:
        """Take a text out; the text in the last slot moves to its slot."""
        if text in self.decoding:
            slot, last = self.decoding.index(text), self.decoding.pop()
            if last is not text:
                self._copy(self._caches, len(self.decoding), slot, last.cached)
                self.decoding[slot] = last
        elif text in self._joining:
            self._joining.remove(text)
        elif text in self.waiting:
            self.waiting.remove(text)

    def _copy(self, source: Sequence[Cache], text: int, slot: int, tokens: int) -> None:
        for port, old, new in zip(self._ports, source, self._caches, strict=True):
            copy_tokens(port, old, text, new, slot, tokens)


def _draw(text: Continuation, logits: Array) -> None:
    """Add the next token, from logits f32[V], and set `end` where it is the last."""
    request = text.request
    try:
        token, complete = text.sampler.draw(logits)
        scores = request.logprobs
        scored = [] if scores is None else [logprobs(logits, token, scores)]
        text.guesses.add(token)
    except BaseException as error:
        text.fail(error)
        return
    text.tokens.append(token)
    text.new += 1
    text.logprobs += scored
    if complete:
        text.end = STOP
    elif len(text.tokens) == request.most:
        text.end = LENGTH
