"""Choosing the next token: the most likely, or at random among the remaining ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from moec.errors import InputError
from moec.runtime.text.request import Request
from moec.runtime.text.sampler import Sampler
from moec.runtime.text.sampling import Logprobs, Sampling, configured, logprobs, nucleus

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def sampler_of(
    sampling: Sampling, prompt: Sequence[int] = (), stream: int = 0, banned: Sequence[int] = ()
) -> Sampler:
    return Sampler(Request(99, sampling, frozenset(banned), least=99), prompt, stream)


def draws(count: int, **how: Any) -> Counter[int]:
    sampling = Sampling(seed=5, **how)
    sampler = sampler_of(sampling)
    return Counter(sampler.draw(LOGITS)[0] for _ in range(count))


def test_the_likeliest_and_of_equals_the_first() -> None:
    rows = np.array([[0, 2, 1, 2], [-np.inf, -np.inf, -3, -np.inf]], np.float32)
    assert [sampler_of(Sampling()).draw(row) for row in rows] == [(1, False), (2, False)]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """3000 draws: three standard deviations of a share of 0.4 are 0.027."""
    state = draws(3000, temperature=1.0)
    for token, share in enumerate([0.1, 0.4, 0.2, 0.3]):
        assert abs(state[token] / 3000 - share) < 0.03


def test_a_low_temperature_takes_the_likeliest() -> None:
    assert set(draws(100, temperature=0.01)) == {1}


def test_what_is_drawn_from() -> None:
    assert set(draws(200, temperature=1.0, top_k=2)) == {1, 3}
    assert set(draws(200, temperature=1.0, top_k=99)) == {0, 1, 2, 3}
    assert set(draws(200, temperature=1.0, top_p=0.4)) == {1}
    assert set(draws(200, temperature=1.0, top_p=0.75)) == {1, 2, 3}
    # top_k first: of the shares 4/7 and 3/7 that it leaves, the first reaches one half.
    assert set(draws(200, temperature=1.0, top_k=2, top_p=0.5)) == {1}


def test_each_text_of_a_seed_has_a_stream_of_its_own() -> None:
    def speak(seed: int | None, stream: int) -> list[int]:
        sampler = sampler_of(Sampling(temperature=1.0, seed=seed), [1, 2], stream)
        return [sampler.draw(LOGITS)[0] for _ in range(30)]

    assert speak(7, 0) == speak(7, 0)
    assert speak(7, 0) != speak(7, 1)
    assert speak(None, 0) != speak(None, 0)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9),
    st.floats(0.01, 5),
    st.floats(0.01, 1),
    st.integers(1, 12),
)
def test_a_drawn_token_is_among_the_likeliest(
    scores: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    sampling = Sampling(temperature, top_p, top_k, seed=0)
    row = np.array(scores, np.float32)
    token, _ = sampler_of(sampling).draw(row)
    assert (row > row[token]).sum() < top_k


LIMITS = [
    {},
    {"top_k": 1},
    {"top_k": 700},
    {"top_p": 0.02},
    {"top_p": 0.7},
    {"top_p": 0.9999},
    {"top_k": 40, "top_p": 0.6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8},
]


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_limits_are_those_of_transformers(limits: dict[str, Any], spread: float) -> None:
    """Its warpers in its order. 5,000 tokens, so that the first 512 are not always enough. A share
    is a sum in float32 there: one token at its edge may differ."""
    draw = np.random.default_rng(3)
    for temperature in (0.5, 1.0, 1.7):
        scores = (draw.standard_normal(5000) * spread).astype(np.float32)
        row = torch.from_numpy(scores)[None] / temperature
        for name, warper in WARPERS.items():
            if name in limits:
                row = warper(limits[name])(None, row)
        remaining = set(torch.nonzero(row[0] > -torch.inf)[:, 0].tolist())
        tokens, shares = nucleus(scores, Sampling(temperature, **limits))
        assert len(remaining ^ set(tokens.tolist())) <= ("top_p" in limits or "typical_p" in limits)
        expected = torch.softmax(row[0], 0)[torch.from_numpy(tokens)].numpy()
        np.testing.assert_allclose(shares / shares.sum(), expected, rtol=2e-3)


WARPERS: dict[str, Any] = {
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}


def test_of_equally_likely_tokens_those_with_the_lowest_ids_remain() -> None:
    scores = np.zeros(1500, np.float32)
    scores[900] = 1
    tokens, _ = nucleus(scores, Sampling(1.0, top_k=4))
    assert tokens.tolist() == [900, 0, 1, 2]
    tokens, _ = nucleus(scores, Sampling(1.0, top_p=0.5))  # beyond the 512 that are sorted first
    assert tokens.tolist() == [900, *range(len(tokens) - 1)]
    assert len(tokens) == 1 + np.ceil(0.5 * (1499 + np.e) - np.e)


def test_a_repetition_is_penalised_as_in_transformers() -> None:
    draw = np.random.default_rng(0)
    prompt, tokens = [3, 9, 3], [5, 9]
    scores = draw.standard_normal(12).astype(np.float32)
    sampler = sampler_of(Sampling(repetition_penalty=1.7), prompt)
    sampler._counts.update(tokens)
    ids = torch.tensor([prompt + tokens])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.from_numpy(scores)[None])[0]
    np.testing.assert_allclose(sampler._changed(scores, []), expected.numpy(), rtol=1e-6)


def test_penalties_count_the_tokens_of_the_text_and_not_of_the_prompt() -> None:
    sampler = sampler_of(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [1, 1])
    logits = np.array([0, 3, 2.6, 2.0], np.float32)
    # 3; 2.25 < 2.6; 2.25 > 1.85; 2.0 is both 2.0 and 2.0: the lower id
    assert [sampler.draw(logits)[0] for _ in range(4)] == [1, 2, 1, 1]
    assert [sampler.draw(logits)[0] for _ in range(2)] == [3, 2]


def test_biases_and_banned_tokens() -> None:
    sampling = Sampling(logit_bias=((0, 100.0), (1, -0.2)))
    assert sampler_of(sampling).draw(LOGITS) == (0, False)
    assert sampler_of(sampling, banned=[0]).draw(LOGITS) == (1, False)
    assert sampler_of(Sampling(), banned=[1, 3]).draw(LOGITS) == (2, False)
    drawn = sampler_of(Sampling(2.0, seed=1), banned=[1, 2])
    assert {drawn.draw(LOGITS)[0] for _ in range(50)} == {0, 3}
    late = Sampler(Request(9, Sampling(), frozenset([1]), least=2), [], 0)
    assert [late.draw(LOGITS) for _ in range(3)] == [(3, False), (3, False), (1, True)]


def test_log_probabilities_are_those_of_the_model() -> None:
    result = logprobs(LOGITS + 7, 2, 3)
    assert np.isclose(result.logprob, np.log(0.2))
    assert [token for token, _ in result.top] == [1, 3, 2]
    assert np.allclose([p for _, p in result.top], np.log([0.4, 0.3, 0.2]))
    assert logprobs(LOGITS, 0, 0) == Logprobs(pytest.approx(np.log(0.1)), ())
    assert len(logprobs(LOGITS, 0, 99).top) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.5}, "temperature is -0.5; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_k": 4}, "top_k: temperature 0 does not sample"),
        ({"top_p": 0.5, "min_p": 0.1}, "top_p and min_p: temperature 0 does not sample"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ({"temperature": 1.0, "typical_p": 0}, "typical_p is 0; it must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0, and 1"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf; it must be finite"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'; it must be a number"),
        ({"logit_bias": ((1.5, 2.0),)}, r"logit_bias holds \(1.5, 2.0\); it is a token id and"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias of token 1 is nan; it must be finite"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Sampling(**options)


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9}, Sampling()),  # as transformers, without do_sample
        ({"repetition_penalty": 1.1, "top_k": 5}, Sampling(repetition_penalty=1.1)),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, Sampling()),
        ({"do_sample": True, "temperature": None, "top_k": 0}, Sampling(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1},
            Sampling(temperature=0.6, top_k=20, top_p=0.95),
        ),
    ],
)
def test_what_the_makers_of_a_model_say(config: dict[str, Any], sampling: Sampling) -> None:
    assert configured(config) == sampling


def test_a_given_field_replaces_the_default() -> None:
    default = Sampling(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert default.changed({"top_p": 0.5}) == Sampling(0.6, 0.5, 20, repetition_penalty=1.1)
    assert default.changed({"temperature": 0.0}) == Sampling(repetition_penalty=1.1)
    assert str(default) == "temperature 0.6, top_k 20, repetition_penalty 1.1"
    with pytest.raises(InputError, match="top_k: temperature 0 does not sample"):
        default.changed({"temperature": 0.0, "top_k": 4})
