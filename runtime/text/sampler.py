"""Draws the tokens of one text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from moec.errors import InputError
from moec.runtime.dtypes import Array
from moec.runtime.text.request import Request
from moec.runtime.text.sampling import GREATEST, LEAST, NoTokenError, nucleus


class Sampler:
    """Draws the tokens of one text after a prompt, as requested. `stream` selects the text's stream
    of random numbers among those of the seed."""

    def __init__(self, request: Request, prompt: Sequence[int], stream: int) -> None:
        self._request, self._sampling = request, request.sampling
        seed = self._sampling.seed
        self._generator = np.random.default_rng(None if seed is None else [seed, stream])
        self._prompt = np.unique(np.array(prompt, np.int64)) if self._sampling.penalises else None
        pairs = np.array([*self._sampling.logit_bias], np.float64).reshape(-1, 2)
        self._biased, self._biases = pairs[:, 0].astype(np.int64), pairs[:, 1]
        self._stop = np.array([t for t in request.stop if 0 <= t < 1 << 31], np.int64)
        self._counts: Counter[int] = Counter()
        self._guide = request.guide.copy() if request.guide else None
        self._drawn = 0

    def draw(self, logits: Array) -> tuple[int, bool]:
        """The next token, from its logits f32[V], and whether it completes the text.

        Raises InputError where they hold NaN or infinity, and NoTokenError where none may come.
        """
        if not logits.max() < np.inf:
            raise InputError("the logits hold NaN or infinity: no next token can be chosen")
        scores, sampling = logits, self._sampling
        banned = self._drawn < self._request.least
        if self._prompt is not None or len(self._biased) or banned:
            scores = self._changed(logits, banned)
        if self._guide is not None:
            scores = self._guide.restrict(scores)
        if scores.max() == -np.inf:
            what = "response_format, min_tokens and the tokens that end a text"
            raise NoTokenError(f"{what} leave no token that may come next: change one of them")
        token = int(scores.argmax()) if sampling.temperature == 0 else self._sample(scores)
        self._drawn += 1
        if self._prompt is not None:
            self._counts[token] += 1
        complete = self._guide is not None and self._guide.advance(token)
        return token, complete or token in self._request.stop

    def _changed(self, logits: Array, banned: bool) -> Array:
        scores, sampling = logits.astype(np.float64), self._sampling
        if self._prompt is not None:
            tokens = np.array([*self._counts], np.int64)
            times = np.array([*self._counts.values()], np.float64)
            every = np.union1d(self._prompt, tokens)
            old, penalty = scores[every], max(sampling.repetition_penalty, LEAST)
            with np.errstate(over="ignore"):
                scores[every] = np.where(old < 0, old * penalty, old / penalty)
                scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
        np.add.at(scores, self._biased, self._biases)
        scores = np.clip(scores, -GREATEST, GREATEST)
        if banned:
            scores[self._stop[self._stop < len(scores)]] = -np.inf
        return scores

    def _sample(self, scores: Array) -> int:
        tokens, shares = nucleus(scores, self._sampling)
        ends = np.cumsum(shares)
        index = np.searchsorted(ends, self._generator.random() * ends[-1], side="right")
        return int(tokens[min(int(index), len(tokens) - 1)])
