"""Choosing the next token: the most likely, or at random among the remaining ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import InputError
from moec.runtime.text.sampling import Sampling, choose

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def draws(count: int, **how: Any) -> Counter[int]:
    sampling = Sampling(seed=5, **how)
    generator = sampling.generator(0)
    return Counter(choose(LOGITS[None], sampling, [generator])[0] for _ in range(count))


def test_the_likeliest_and_of_equals_the_first() -> None:
    rows = np.array([[0, 2, 1, 2], [-np.inf, -np.inf, -3, -np.inf]], np.float32)
    assert choose(rows, Sampling(), [Sampling().generator(n) for n in range(2)]) == [1, 2]


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


def test_a_seed_gives_a_text_whatever_it_is_batched_with() -> None:
    sampling = Sampling(temperature=1.0, seed=7)

    def speak(texts: int) -> list[list[int]]:
        generators = [sampling.generator(n) for n in range(texts)]
        return [choose(np.tile(LOGITS, (texts, 1)), sampling, generators) for _ in range(20)]

    one, two = speak(1), speak(2)
    assert [row[0] for row in two] == [row[0] for row in one]
    assert [row[1] for row in two] != [row[0] for row in one]
    fresh = Sampling(temperature=1.0)
    assert fresh.generator(0).random() != fresh.generator(0).random()


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
    (token,) = choose(row[None], sampling, [sampling.generator(0)])
    assert (row > row[token]).sum() < top_k


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.5}, "temperature is -0.5; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_k": 4}, "temperature 0 does not sample"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Sampling(**options)
