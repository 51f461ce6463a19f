"""Limits of tokens a second: choices are solved for fewer bytes until what is measured suffices."""

from __future__ import annotations

from typing import Any, cast

import pytest

import moec
from moec.errors import UsageError
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.optimise.optimisation.search import ChoiceLimits, ChoiceSearch
from moec.optimise.optimisation.speed import TRIES, FastChoice, choose_fast, writing_speed
from moec.passes.approximate.choices.model_choices import ModelChoices
from tests.optimise.optimisation.test_moves import X, net


@pytest.fixture(scope="module")
def searched() -> ChoiceSearch:
    return search(net(), (X[:5],), calib={"x": X}, formats=("int8", "int4:32"))


def choose(
    searched: ChoiceSearch, least: float, seconds: float, limits: ChoiceLimits, measured: list[int]
) -> FastChoice:
    """A choice on a machine that reads a byte in a second, and needs `seconds` for the rest;
    `measured` gets the bytes of what is compiled."""

    def compiled(choices: ModelChoices | None) -> Any:
        return searched.token_bytes("damage") if choices is None else choices.token_bytes

    def measure(model: Any) -> float:
        measured.append(cast(int, model))
        return 1 / (model + seconds)

    return choose_fast(searched, limits, least, compiled, measure)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_choice_is_as_fast_as_asked_and_no_smaller_than_it_has_to_be(
    searched: ChoiceSearch, share: float
) -> None:
    """Half of the bytes: with a part of the time for something else, less than half."""
    bytes_ = searched.token_bytes("damage")
    seconds, measured = share * bytes_, list[int]()
    least = 1 / (bytes_ / 2 + seconds)
    fast = choose(searched, least, seconds, ChoiceLimits(), measured)
    assert fast.tokens_per_second >= least
    assert measured[0] == bytes_
    assert fast.choices.token_bytes == measured[-1] <= bytes_ / 2
    assert len(measured) <= 1 + TRIES
    assert {choice.format for choice in fast.choices.products.values()} != {"int4:32"}


def test_other_limits_hold_too(searched: ChoiceSearch) -> None:
    limits = choice_limits(None, searched.token_bytes("damage") // 4, None)
    fast = choose(searched, 1e-9, 0, limits, [])
    assert fast.choices.token_bytes <= searched.token_bytes("damage") // 4


def test_a_model_that_is_fast_enough_is_told(searched: ChoiceSearch) -> None:
    with pytest.raises(UsageError, match="tokens a second as it is: use moec compile"):
        choose(searched, 1e-9, 0, ChoiceLimits(), [])


def test_what_no_format_reaches_is_refused(searched: ChoiceSearch) -> None:
    measured = list[int]()
    with pytest.raises(UsageError, match=r"measured, the fastest writes .* and the limit is 1:"):
        choose(searched, 1.0, 0, ChoiceLimits(), measured)
    assert measured == [searched.token_bytes("damage"), searched.token_bytes("token_bytes")]
    slow: Any = lambda choices: None  # noqa: E731
    with pytest.raises(UsageError, match=r"the fastest writes 0.99 tokens a second, and the li"):
        choose_fast(searched, ChoiceLimits(), 1.0, slow, measure=lambda model: 0.99)
    with pytest.raises(UsageError, match=r"the limit of a token is 1 byte"):
        choose(searched, 1e-9, 0, choice_limits(None, 1, None), [])


def test_models_that_write_no_text_are_refused() -> None:
    model = moec.compile(net(), (X[:5],), verify=False)
    with pytest.raises(UsageError, match="limit models that write text step by step, and this one"):
        writing_speed(model)


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_speed(number: float) -> None:
    with pytest.raises(UsageError, match="give a number above 0"):
        choice_limits(None, None, None, number)
