"""Beam search: of each text the likeliest continuations as a whole, not the likeliest next tokens.

Its meaning is that of transformers' `generate(num_beams=...)` without sampling, with scores in
float32 as there, and the same rules for when a search ends. Of equal scores the earlier beam comes
first, then the lower token; there `torch.topk` decides, which documents no order.

The beams of a text are adjacent rows of each step. A beam's first continuation stays in its row;
each other one goes to the row of a beam that ends. Only the cache entries in which they differ are
copied: keys and values of tokens that both begin with have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from moec.errors import InputError
from moec.runtime.call.caches import Cache, copy_tokens
from moec.runtime.dtypes import Array
from moec.runtime.text.engine import FAILED, LENGTH, STOP, Continuation, Engine
from moec.runtime.text.request import BeamOptions, Request
from moec.runtime.text.sampling import likeliest
from moec.runtime.text.texts import Decoder

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
