"""Perplexity, KL and their intervals, beside torch and counts by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.optimise.evaluation.evaluate import Estimate, score_text, windows
from moec.optimise.evaluation.subject import Subject

TABLE = np.random.default_rng(0).standard_normal((3, 128, 128)).astype(np.float32)


def subject(number: int = 0, longest: int | None = None, shift: int = 0, **more: Any) -> Subject:
    """A bigram model of characters. `shift` is added to each token."""
    tokenizer: Any = SimpleNamespace(
        encode=lambda text: [(ord(c) + shift) % 128 for c in text], stop=more.get("stop", ())
    )

    def logits(tokens: Sequence[int]) -> np.ndarray:
        return TABLE[number][list(tokens)]

    return Subject(f"bigram {number}", 0, tokenizer, longest, more.get("logits", logits))


@given(st.integers(1, 60), st.integers(2, 20), st.integers(1, 20))
def test_each_token_is_counted_once_after_enough_others(count, length, stride):
    stride = min(stride, length - 1)
    parts = windows(count, length, stride)
    counted = [token for part in parts for token in range(part.first, part.end)]
    assert counted == list(range(1, count))
    for part in parts:
        assert part.end - part.start <= length
        assert part.first - part.start >= min(length - stride, part.first)


def test_nats_are_torchs_cross_entropy():
    text = "The quick brown fox jumps over the lazy dog."
    (score,) = score_text([subject()], text, 1000, 500)
    ids = torch.tensor([ord(c) for c in text])
    expected = torch.nn.functional.cross_entropy(torch.tensor(TABLE[0])[ids[:-1]], ids[1:])
    assert score.nats.mean == pytest.approx(float(expected), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert score.predicted == len(text) - 1
    assert score.bits_per_byte == pytest.approx(float(expected) / math.log(2) * 43 / 44, rel=1e-6)
    assert math.isnan(score.nats.error)
    assert score.kl is None


def test_the_window_changes_nothing_of_a_bigram():
    text = "".join(chr(n) for n in np.random.default_rng(1).integers(32, 127, 300))
    reference = score_text([subject(0), subject(1)], text, 300, 150)
    for length, stride in ((2, 1), (7, 3), (64, 63), (299, 1)):
        scores = score_text([subject(0), subject(1)], text, length, stride)
        for ours, expected in zip(scores, reference, strict=True):
            assert ours.nats.mean == pytest.approx(expected.nats.mean, rel=1e-6)
        assert scores[1].kl.mean == pytest.approx(reference[1].kl.mean, rel=1e-5)
        assert scores[1].agreement.mean == reference[1].agreement.mean


def test_kl_and_agreement_beside_torch():
    text = "some words of text, some more"
    _, same, other = score_text([subject(0), subject(0), subject(1)], text, 16, 8)
    assert (same.kl.mean, same.agreement.mean) == (0.0, 1.0)
    ids = [ord(c) for c in text[:-1]]
    p, q = (torch.tensor(TABLE[n])[ids].log_softmax(-1) for n in (0, 1))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert other.kl.mean == pytest.approx(float(expected), rel=1e-5)
    agreed = (p.argmax(-1) == q.argmax(-1)).float().mean()
    assert other.agreement.mean == pytest.approx(float(agreed))


def test_an_impossible_token_of_the_reference_adds_nothing():
    masked = TABLE[0].copy()
    masked[:, 7] = -np.inf
    first = subject(logits=lambda tokens: masked[list(tokens)])
    _, score = score_text([first, subject(1)], "abcabc", 4, 2)
    assert math.isfinite(score.kl.mean)


def test_other_tokens_are_not_compared():
    _, score = score_text([subject(0), subject(1, shift=1)], "some words", 8, 4)
    assert score.kl is None
    assert score.agreement is None


def test_intervals_are_those_of_means_of_equal_samples():
    means = np.random.default_rng(0).standard_normal(20)
    estimate = Estimate.of(means * 5, [5] * 20)
    assert estimate.mean == pytest.approx(means.mean())
    assert estimate.error == pytest.approx(means.std(ddof=1) / math.sqrt(20))


@pytest.mark.parametrize(
    ("text", "models", "words"),
    [
        ("a", [subject()], "fewer than two tokens"),
        ("some text", [subject(longest=7)], "takes at most 7 tokens: give a shorter window"),
        ("ab", [subject(logits=lambda t: np.full((len(t), 128), np.nan))], "are no numbers"),
        ("ab", [subject(logits=lambda t: TABLE[0][list(t), :50])], "tokens that the model does"),
    ],
)
def test_refusals(text, models, words):
    with pytest.raises(UsageError, match=words):
        score_text(models, text, 8, 4)
