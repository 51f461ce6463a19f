"""Texts that a model continues, with the keys and values of all their tokens.

Each set of texts has separate caches, so that several sets can be in use with one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from moec.errors import InputError
from moec.runtime.call.account import Account
from moec.runtime.call.caches import Cache, copy_text
from moec.runtime.dtypes import Array
from moec.runtime.package import DECODE, Package, carries

PIECE = 512  # the most tokens, over all texts, of one call of the model; bounds memory
ROWS = 32  # above the most rows for which attention has a kernel of its own, 24
PADDED = 4 / 3  # the most rows of a text that is read with others, by its tokens


def fit_together(sizes: Sequence[int], carries: bool) -> bool:
    """Whether one call may read texts of so many tokens, with little padding, where each has the
    bits that it has alone. `carries`: padding would change recurrent states."""
    most, least = max(sizes), min(sizes)
    return most == least or (not carries and ROWS <= least and most <= PADDED * least)


class Decoder(Protocol):
    """Runs the function `decode`: an Executor, or the ranks of a plan together."""

    @property
    def package(self) -> Package:
        """The package, with the signature of `decode` and its `generation`."""

    @property
    def holds_all_texts(self) -> bool:
        """Whether the caches of `new_caches` are those of all texts, not of a rank's share."""

    @property
    def account(self) -> Account | None:
        """That of verified tokens; None where several tokens of a text cannot be verified."""

    def number_requests(self, count: int) -> Array:
        """The numbers i32[count] of the next requests."""

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        """Caches for some texts of at most `room` tokens each."""

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        """Logits f32[B, Q, V]; see `Executor.decode`."""


class Texts:
    """Some texts of at most `room` tokens each, of which new caches hold `first`."""

    def __init__(self, executor: Decoder, texts: int, room: int, first: int | Array = 0) -> None:
        decode, generation = executor.package.functions[DECODE], executor.package.generation
        assert generation is not None
        self._executor, self._room = executor, room
        self._vocabulary, self._carries = generation.vocabulary, carries(decode)
        self._first = np.zeros(texts, np.int64) + first
        self._requests = executor.number_requests(texts)
        self._caches = executor.new_caches(texts, room)

    @property
    def caches(self) -> Sequence[Cache]:
        return self._caches

    def go_back(self, length: int) -> None:
        """Forget all but the first tokens of each text. Not for recurrent states."""
        self._first[:] = np.minimum(self._first, length)

    def feed(self, tokens: Sequence[Sequence[int]]) -> Array:
        """Append tokens to each text. Returns the logits f32[texts, V] after the last of each.

        Tokens are processed in chunks, and all texts end with the last chunk: a text with fewer
        tokens starts in a later one. Chunks are padded on the right; the cache entries of padding
        are overwritten by the tokens that follow.
        """
        if self._carries:
            return self._feed_exactly(tokens)
        most, room = max(map(len, tokens)), int((self._room - self._first).min())
        piece = max(1, min(most, PIECE // len(tokens), room))
        logits: Array | None = None
        for left in reversed(range(0, most, piece)):  # tokens that come after this piece
            padded = np.zeros((len(tokens), piece), np.int64)
            counts = np.zeros(len(tokens), np.int64)
            for text, new_tokens in enumerate(tokens):
                stop = max(0, len(new_tokens) - left)
                part = new_tokens[max(0, stop - piece) : stop]
                padded[text, : len(part)] = part
                counts[text] = len(part)
            logits = self._run(padded, counts)
        assert logits is not None
        return logits

    def _feed_exactly(self, tokens: Sequence[Sequence[int]]) -> Array:
        """As `feed`, without padding, which would change recurrent states. Texts without tokens
        count as ended: their states advance with an arbitrary token."""
        lengths = {len(new_tokens) for new_tokens in tokens if len(new_tokens)}
        if len(lengths) > 1:
            return self._feed_alone(tokens)
        (most,) = lengths
        piece = max(1, PIECE // len(tokens))
        rectangle = np.array(
            [new_tokens if len(new_tokens) else [0] * most for new_tokens in tokens], np.int64
        )
        fed = np.array([len(new_tokens) > 0 for new_tokens in tokens])
        for start in range(0, most, piece):
            part = np.ascontiguousarray(rectangle[:, start : start + piece])
            logits = self._run(part, fed * part.shape[1])
        return logits

    def _feed_alone(self, tokens: Sequence[Sequence[int]]) -> Array:
        """Feed each text in separate caches, which are then copied to its part of all caches."""
        rows: list[Array] = []
        for text, new_tokens in enumerate(tokens):
            alone = Texts(self._executor, 1, self._room)
            alone._first[:] = self._first[text]
            alone._requests = self._requests[text : text + 1]
            for text_cache, cache in zip(alone._caches, self._caches, strict=True):
                copy_text(cache, text, text_cache, 0)
            rows.append(alone.feed([new_tokens])[0] if len(new_tokens) else np.zeros(0, np.float32))
            self._first[text] = alone._first[0]
            for text_cache, cache in zip(alone._caches, self._caches, strict=True):
                copy_text(text_cache, 0, cache, text)
        width = max(row.size for row in rows)
        return np.stack([row if row.size else np.zeros(width, np.float32) for row in rows])

    def _run(self, padded: Array, counts: Array) -> Array:
        """Run one chunk; text b has counts[b] tokens in it, then padding."""
        texts, piece = padded.shape
        self._check(padded, counts)
        first = np.minimum(self._first, self._room - piece)  # of a text that is full, and idle
        last = np.maximum(counts - 1, 0)
        rows = (np.arange(texts) * piece + last)[:, None]
        inputs = [padded, first, rows, first + last]
        logits = self._executor.decode(inputs, self._caches, self._requests, counts)
        self._first += counts
        return logits[:, 0]

    def _check(self, padded: Array, counts: Array) -> None:
        low, high = int(padded.min()), int(padded.max())
        if low < 0 or high >= self._vocabulary:
            raise InputError(
                f"token {low if low < 0 else high} is not one of the model's "
                f"{self._vocabulary} tokens"
            )
        if int((self._first + counts).max()) > self._room:
            raise InputError(f"a text has more tokens than its cache holds, {self._room}")
