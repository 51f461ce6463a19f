"""Text generation with a compiled causal language model.

If the model has the function `decode`, an engine continues all texts; on the ranks of a plan, which
share the texts, all texts take the same steps. A model that was captured with a cache uses it. Any
other model processes the entire text for each token; `slow` returns the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np

from moec.errors import InputError
from moec.runtime.call.caches import Cache, copy_tokens
from moec.runtime.dtypes import Array
from moec.runtime.text.causal_lm import CausalLM, causal_lm, inputs
from moec.runtime.text.engine import FAILED, LENGTH, STOP, Continuation, Engine
from moec.runtime.text.request import BeamOptions, Request
from moec.runtime.text.sampler import Sampler
from moec.runtime.text.sampling import likeliest
from moec.runtime.text.texts import Decoder, Texts

# Beam search: of each text the likeliest continuations as a whole, not the likeliest next tokens.
#
# Its meaning is that of transformers' `generate(num_beams=...)` without sampling, with scores in
# float32 as there, and the same rules for when a search ends. Of equal scores the earlier beam
# comes first, then the lower token; there `torch.topk` decides, which documents no order.
#
# The beams of a text are adjacent rows of each step. A beam's first continuation stays in its row;
# each other one goes to the row of a beam that ends. Only the cache entries in which they differ
# are copied: keys and values of tokens that both begin with have the same bits.

UNLIKELY = np.float32(-1e9)  # the score of what must not be chosen


class BeamSearch:
    """The search of one text. `tokens` are the new ones of each beam and `scores` f32[beams] their
    log probabilities, the likeliest first; `rows` are the rows of the caches with all their tokens
    but the latest. `finished` are the best complete ones, with their scores."""

    def __init__(self, request: Request, options: BeamOptions) -> None:
        self._request, self._options = request, options
        self.tokens: list[list[int]] = [[] for _ in range(options.count)]
        self.scores: Array = np.full(options.count, UNLIKELY)
        self.scores[0] = 0  # all beams begin alike, and one is continued
        self.rows = [*range(options.count)]
        self.finished: list[tuple[float, list[int]]] = []
        self.ended = False

    @property
    def sequences(self) -> list[list[int]]:
        """The results, the best first; of a search that has not ended, the likeliest beam."""
        best = [tokens for _, tokens in self.finished[: self._options.returned]]
        return best if self.ended else self.tokens[:1]

    def advance(self, logits: Array) -> list[tuple[int, int, int]]:
        """Take the next tokens, from logits f32[beams, V] in the order of `tokens`. Returns which
        rows are to be copied: from, to, and the number of new tokens that both begin with."""
        count, stop = self._options.count, np.array([*self._request.stop], np.int64)
        step, size = len(self.tokens[0]) + 1, logits.shape[1]
        scores = log_softmax(logits)
        if step <= self._request.least:
            scores[:, stop[(stop >= 0) & (stop < size)]] = -np.inf
        total = (scores + self.scores[:, None]).ravel()
        # So many that enough of them do not end, where each beam has all tokens of `stop`.
        candidates = likeliest(total, min(count * max(2, 1 + len(stop)), total.size))
        scores, (beams, tokens) = total[candidates], np.divmod(candidates, size)
        ends = np.isin(tokens, stop) | (step == self._request.most)
        longer = [[*self.tokens[b], t] for b, t in zip(beams, tokens.tolist(), strict=True)]
        chosen = likeliest(scores + UNLIKELY * ends, count)
        before, self.tokens = self.tokens, [longer[index] for index in chosen]
        self.scores = (scores + UNLIKELY * ends)[chosen]
        final = scores[:count] / np.float32(step**self._options.length_penalty)
        items = zip(final.tolist(), longer, ends, strict=False)
        self.finished += [(score, each) for score, each, end in items if end]
        self.finished = sorted(self.finished, key=lambda item: -item[0])[:count]
        self.ended = bool(ends.all()) or not self._may_improve(step)
        return [] if self.ended else self._move(beams[chosen].tolist(), before)

    def _may_improve(self, step: int) -> bool:
        options = self._options
        if len(self.finished) < options.count or options.early_stopping is True:
            return len(self.finished) < options.count
        never = options.early_stopping == "never" and options.length_penalty > 0
        length = self._request.most if never else step
        best = self.scores[0] / np.float32(length**options.length_penalty)
        return bool(best > self.finished[-1][0])

    def _move(self, sources: list[int], before: list[list[int]]) -> list[tuple[int, int, int]]:
        """Update the rows, where the beams continue those of `sources`."""
        copies, rows, continued = [], list[int](), set[int]()
        free = [beam for beam in range(len(before)) if beam not in sources]
        for source in sources:
            row = self.rows[source]
            if source in continued:
                other = free.pop()
                pairs = zip(before[source], before[other], strict=True)
                shared = next((n for n, (a, b) in enumerate(pairs) if a != b), len(before[source]))
                copies.append((row, self.rows[other], shared))
                row = self.rows[other]
            continued.add(source)
            rows.append(row)
        self.rows = rows
        return copies


class BeamEngine(Engine):
    """Searches `slots` texts at a time, each in as many rows as it has beams.

    The tokens of a text are those of its likeliest beam until it ends; then they are those of its
    best sequence, and all are new.
    """

    def __init__(self, executor: Decoder, slots: int, room: int, options: BeamOptions) -> None:
        """Raises InputError as `Engine`."""
        super().__init__(executor, slots * options.count, room, prompts_first=True)
        self.slots, self._options = slots, options
        self._searches: WeakKeyDictionary[Continuation, BeamSearch] = WeakKeyDictionary()

    def search(self, texts: Sequence[Continuation]) -> list[list[int]]:
        """The new tokens of the best sequences of each text, as many as were requested of each.

        Raises InputError for the first text that fails.
        """
        while not all(text.end for text in texts):
            self.step()
        for text in texts:
            if text.end == FAILED:
                text.raise_cause()
        return [sequence for text in texts for sequence in self._searches[text].sequences]

    def _joined(self, logits: Array) -> None:
        texts, caches, first = self._joining, self._joining_caches, len(self.decoding)
        self._joining, in_place = [], caches is self._views.get(len(texts))
        self.decoding += texts
        count = self._options.count
        for number in reversed(range(len(texts))):  # in place, rows after it have been copied
            for row in range((first + number) * count, (first + number + 1) * count):
                if not in_place or row != number:
                    self._copy_row(caches, number, row, 0, texts[number].cached)
        self._searches.update({text: BeamSearch(text.request, self._options) for text in texts})
        self._advance(texts, np.repeat(logits, count, axis=0).reshape(len(texts), count, -1), first)

    def _decode(self, texts: Sequence[Continuation]) -> tuple[int, int]:
        searches = [self._searches[text] for text in texts]
        rows = len(texts) * self._options.count
        tokens = np.zeros((len(texts), self._options.count), np.int64)
        for latest, search in zip(tokens, searches, strict=True):
            latest[search.rows] = [beam[-1] for beam in search.tokens]
        first = np.repeat([text.cached for text in texts], self._options.count)
        logits = self._executor.decode(
            [tokens.reshape(rows, 1), first, np.arange(rows).reshape(rows, 1), first],
            self._first(rows),
            np.repeat(np.concatenate([text.number for text in texts]), self._options.count),
            np.ones(rows, np.int64),
        )
        self._advance(texts, logits.reshape(*tokens.shape, -1), 0)
        return 0, 0

    def _advance(self, texts: Sequence[Continuation], logits: Array, first: int) -> None:
        """Advance the searches of texts, from slot `first` on, by logits f32[texts, beams, V]."""
        for slot, (text, scores) in enumerate(zip(texts, logits, strict=True), first):
            search = self._searches[text]
            if np.isnan(scores).any():
                text.fail(InputError("the logits hold NaN: no beam can be chosen"))
                continue
            copies = search.advance(scores[search.rows])
            text.tokens, start = search.sequences[0], slot * self._options.count
            for source, row, shared in copies:
                shared += len(text.prompt)
                self._copy_row(self._caches, start + source, start + row, shared, text.cached)
            if search.ended:
                text.end = STOP if text.tokens[-1] in text.request.stop else LENGTH
                text.new = len(text.tokens)
        for text in texts:
            if text.end:
                self._release(text)

    def _copy(self, source: Sequence[Cache], text: int, slot: int, tokens: int) -> None:
        first, start = text * self._options.count, slot * self._options.count
        for row in range(self._options.count):
            self._copy_row(source, first + row, start + row, 0, tokens)

    def _copy_row(
        self, source: Sequence[Cache], row: int, target: int, start: int, tokens: int
    ) -> None:
        for port, old, new in zip(self._ports, source, self._caches, strict=True):
            copy_tokens(port, old, row, new, target, tokens, start)


def log_softmax(logits: Array) -> Array:
    """The log probabilities f32[beams, V] of logits of that shape."""
    shifted = logits - logits.max(1, keepdims=True)
    scores: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return scores


Feed = Callable[[Sequence[Sequence[int]]], Array]
"""Appends tokens to each text, and returns the logits f32[texts, V] after the last of each."""


@runtime_checkable
class Whole(Protocol):
    """Runs an entire text in one call: an Executor."""

    def reset(self) -> None:
        """Reset the caches to those that the model was captured with."""

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Any]:
        """The outputs of `main`, by name."""


def slow(executor: Decoder) -> str:
    """The reason why each token takes a run over the entire text; "" if it does not."""
    package = executor.package
    return "" if package.generation or package.main.states else package.no_generation


def longest_of(executor: Decoder) -> int | None:
    """The greatest number of tokens of a text; None without a limit."""
    generation = executor.package.generation
    return generation.longest if generation else causal_lm(executor.package.main).longest


def generate(
    executor: Decoder, prompts: Sequence[Sequence[int]], request: Request
) -> Iterator[tuple[int | None, ...]]:
    """Iterates over the next tokens of all texts; None for a text that has ended.

    A text ends with a token of `stop`, after `most` tokens, or at the model's greatest length.
    With several beams there are as many texts as are returned for each prompt, best first.
    Raises InputError where a prompt is empty or longer than that.
    """
    _check(executor, prompts, request)
    if executor.package.generation is not None and executor.holds_all_texts:
        yield from _by_engine(executor, prompts, request)
        return
    if request.guesses or request.draft is not None or request.beams.count > 1:
        what = "a draft was given" if request.draft else f"speculate is {request.guesses}"
        what = f"num_beams is {request.beams.count}" if request.beams.count > 1 else what
        raise InputError(f"{what}, and this model has no KV cache of its own process: leave it out")
    limit = longest_of(executor)
    room = max(len(prompt) + request.most for prompt in prompts)
    feed = _feed(executor, prompts, room if limit is None else min(room, limit))
    streams = request.streams or range(len(prompts))
    samplers = [Sampler(request, p, n) for p, n in zip(prompts, streams, strict=False)]
    lengths = [len(prompt) for prompt in prompts]
    fresh: list[Sequence[int]] = list(prompts)
    open_ = [True] * len(prompts)
    for _ in range(request.most):
        open_ = [o and (limit is None or n <= limit) for o, n in zip(open_, lengths, strict=True)]
        if not any(open_):
            return
        logits = feed([new_tokens if o else () for new_tokens, o in zip(fresh, open_, strict=True)])
        tokens: list[int | None] = []
        for text, (sampler, row) in enumerate(zip(samplers, logits, strict=True)):
            if not open_[text]:
                tokens.append(None)
                continue
            try:
                token, complete = sampler.draw(row)
            except InputError as error:
                raise InputError(f"after {lengths[text]} tokens: {error}") from error
            tokens.append(token)
            fresh[text], open_[text] = [token], not complete
            lengths[text] += 1
        yield tuple(tokens)


def _by_engine(
    executor: Decoder, prompts: Sequence[Sequence[int]], request: Request
) -> Iterator[tuple[int | None, ...]]:
    limit = longest_of(executor)
    mosts = [min(request.most, limit + 1 - len(p)) if limit else request.most for p in prompts]
    room = max(len(p) + most - 1 for p, most in zip(prompts, mosts, strict=True))
    engine = engine_for(executor, len(prompts), room, request)
    streams = request.streams or range(len(prompts))
    texts = [
        engine.submit(prompt, replace(request, most=most, least=min(request.least, most)), stream)
        for prompt, most, stream in zip(prompts, mosts, streams, strict=False)
    ]
    if isinstance(engine, BeamEngine):
        yield from zip_longest(*engine.search(texts))
        return
    for count in range(max(mosts)):
        while any(not text.end and len(text.tokens) <= count for text in texts):
            engine.step()
        for text in texts:
            if text.end == FAILED and len(text.tokens) == count:
                text.raise_cause()
        tokens = [text.tokens[count] if count < len(text.tokens) else None for text in texts]
        if not any(token is not None for token in tokens):
            return
        yield tuple(tokens)


def engine_for(executor: Decoder, slots: int, room: int, request: Request) -> Engine:
    """An engine for texts that are continued as requested, in as few steps as possible."""
    if request.beams.count > 1:
        return BeamEngine(executor, slots, room, request.beams)
    return Engine(executor, slots, room, prompts_first=True)


def vocabulary_of(executor: Decoder) -> int:
    """The number of the model's tokens. Raises InputError where it continues no texts."""
    generation = executor.package.generation
    if generation:
        return generation.vocabulary
    return int(causal_lm(executor.package.main).logits.shape[2])


def _check(executor: Decoder, prompts: Sequence[Sequence[int]], request: Request) -> None:
    longest, vocabulary = longest_of(executor), vocabulary_of(executor)
    if not prompts:
        raise InputError("there is no prompt: give at least one")
    for number, prompt in enumerate(prompts):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not len(prompt):
            raise InputError(f"{which} has no tokens; give at least one")
        if longest is not None and len(prompt) > longest:
            raise InputError(
                f"{which} has {len(prompt)} tokens, and the model takes at most {longest}"
            )
        request.check_ids(prompt, vocabulary)


def _feed(executor: Decoder, prompts: Sequence[Sequence[int]], room: int) -> Feed:
    if executor.package.generation is not None:
        return Texts(executor, len(prompts), room).feed
    if not isinstance(executor, Whole):
        raise InputError(
            "several ranks continue text with the function `decode`, which this plan does not have"
        )
    lm = causal_lm(executor.package.main)
    if lm.cached and len(prompts) > 1:
        raise InputError(
            f"{len(prompts)} prompts, and the model's own cache is for one: give one at a time"
        )
    executor.reset()
    return partial(_run_afresh, executor, lm, [[] for _ in prompts])


def _run_afresh(
    executor: Whole, lm: CausalLM, texts: list[list[int]], tokens: Sequence[Sequence[int]]
) -> Array:
    """Runs each text from its start, or from the end of the model's own cache."""
    rows: list[Array] = []
    for text, new_tokens in zip(texts, tokens, strict=True):
        start = len(text) if lm.cached else 0
        text += new_tokens
        if new_tokens:
            logits = executor(inputs(lm, text, start))[lm.logits.name]
            rows.append(logits[0, -1].astype(np.float32))
        else:
            rows.append(np.zeros(0, np.float32))
    width = max(row.size for row in rows)
    return np.stack([row if row.size else np.zeros(width, np.float32) for row in rows])
