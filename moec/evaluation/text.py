"""How well a model predicts a text, and how far it is from a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moec.errors import UsageError
from moec.evaluation.estimate import Estimate
from moec.evaluation.subject import Subject
from moec.runtime.dtypes import Array

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a text; those from `first` on are predicted and counted."""

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class TextScore:
    """`nats` is the mean negative log likelihood of a token; against the reference: `kl` its
    divergence in nats a token, `agreement` the share of tokens whose likeliest token is the same.
    `bits_per_byte` compares models with different tokenizers."""

    nats: Estimate
    bits_per_byte: float
    predicted: int
    kl: Estimate | None = None
    agreement: Estimate | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats.mean, 700.0))

    @property
    def perplexity_error(self) -> float:
        """The standard error, by the delta method."""
        return self.perplexity * self.nats.error

    def to_dict(self) -> dict[str, Any]:
        return {"perplexity": self.perplexity, "perplexity_error": self.perplexity_error} | asdict(
            self
        )


def windows(count: int, length: int, stride: int) -> list[Window]:
    """Windows over `count` tokens, each `stride` after the one before. Each token but the first is
    counted once, in the first window that has it: with a stride below the length, after at least
    length - stride others."""
    ends = [min(length, count)]
    while ends[-1] < count:
        ends.append(min(ends[-1] + stride, count))
    firsts = [1, *ends[:-1]]
    return [
        Window(max(0, end - length), first, end) for first, end in zip(firsts, ends, strict=True)
    ]


def score_text(
    subjects: Sequence[Subject],
    text: str,
    length: int,
    stride: int,
    progress: Progress = lambda phase: None,
) -> list[TextScore]:
    """The scores of all models on one text; the first is the reference of those with its tokens.

    Raises UsageError where the text has fewer than two tokens, or a model takes no such windows.
    """
    for subject in subjects:
        if subject.longest is not None and length > subject.longest:
            raise UsageError(
                f"{subject.name} takes at most {subject.longest} tokens: give a shorter window"
            )
    tokens = [subject.tokenizer.encode(text) for subject in subjects]
    if min(map(len, tokens)) < 2:
        raise UsageError("the text has fewer than two tokens: there is nothing to predict")
    same = [each == tokens[0] for each in tokens]
    sums: list[list[tuple[float, float, float, int]]] = [[] for _ in subjects]
    most = max(len(windows(len(each), length, stride)) for each in tokens)
    for number in range(most):
        progress(f"window {number + 1} of {most}")
        reference: Array | None = None
        for index, subject in enumerate(subjects):
            parts = windows(len(tokens[index]), length, stride)
            if number >= len(parts):
                continue
            part, ids = parts[number], tokens[index]
            scores = subject.log_probs(ids[part.start : part.end])
            scores = scores[part.first - part.start - 1 : -1]
            reference = scores if index == 0 else reference
            against = reference if same[index] and index else None
            sums[index].append(_sums(scores, ids[part.first : part.end], against))
    size = len(text.encode())
    return [_score(rows, size, bool(n) and same[n]) for n, rows in enumerate(sums)]


def _sums(
    scores: Array, follow: Sequence[int], reference: Array | None
) -> tuple[float, float, float, int]:
    """Nats, KL, agreements and number of tokens of a window."""
    if max(follow, default=0) >= scores.shape[-1]:
        raise UsageError("the tokenizer has tokens that the model does not")
    nats = -float(scores[np.arange(len(follow)), follow].sum(dtype=np.float64))
    if reference is None:
        return nats, 0.0, 0.0, len(follow)
    if reference.shape != scores.shape:
        raise UsageError("the models have vocabularies of different sizes")
    possible = reference > -np.inf  # others add nothing; 0 * -inf is NaN
    terms = np.exp(reference[possible]) * (reference[possible] - scores[possible])
    equal = reference.argmax(-1) == scores.argmax(-1)
    return nats, float(terms.sum(dtype=np.float64)), float(equal.sum()), len(follow)


def _score(rows: Sequence[tuple[float, float, float, int]], size: int, compared: bool) -> TextScore:
    nats, kl, equal, counts = zip(*rows, strict=True)
    total = Estimate.of(nats, counts)
    bits = sum(nats) / math.log(2) / size
    if not compared:
        return TextScore(total, bits, sum(counts))
    return TextScore(total, bits, sum(counts), Estimate.of(kl, counts), Estimate.of(equal, counts))
