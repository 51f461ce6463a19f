"""Tokens that are verified together are those that come one at a time, whatever is guessed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.errors import InputError
from moec.runtime.artifact.artifact import read
from moec.runtime.call.account import ROWS, TRIALS, Account
from moec.runtime.call.executor import Executor, start
from moec.runtime.expert_store.device import DIRECT
from moec.runtime.expert_store.native import StoreOptions
from moec.runtime.expert_store.start import start_with_slots
from moec.runtime.text.engine import CANCELLED, FAILED, LENGTH, STOP, Continuation, Engine
from moec.runtime.text.generate import generate
from moec.runtime.text.request import AUTO, OFF, Request
from moec.runtime.text.sampling import Sampling
from moec.runtime.text.speculation.draft import MEMORY, MOST, Guesses
from tests.models.other_families import OTHER_FAMILIES
from tests.once import Once
from tests.runtime.expert_store.models import LAYERS, artifact


class AnyRows(Account):
    """Verifies any number of guesses."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def rows(self, guesses: Any, cost: float = 0.0) -> int:
        return self._random.randint(1, ROWS[-1])


@pytest.fixture(scope="module", params=["memory", "disk"])
def model(request: pytest.FixtureRequest, once: Once) -> Executor:
    if request.param == "memory":
        return cached(request)
    return start_with_slots(read(artifact(once, None)), [2] * LAYERS, DIRECT, StoreOptions())


def cached(request: pytest.FixtureRequest) -> Executor:
    compiled: moec.CompiledModel = request.getfixturevalue("compiled_tiny_moe")
    assert isinstance(compiled.executor, Executor)
    return compiled.executor


def job(chance: random.Random) -> tuple[list[int], Request]:
    """Prompts that repeat themselves; greedy texts, which soon do, and sampled ones."""
    period = chance.choice([1, 3, 10, 40])
    prompt = [n % period + 3 for n in range(chance.choice([1, 2, 5, 20, 27]))]
    sampling = chance.choice(
        [
            Sampling(),
            Sampling(0.4, seed=chance.randrange(9)),
            Sampling(1.0, 0.9, seed=1, repetition_penalty=1.1, frequency_penalty=0.5),
        ]
    )
    if chance.random() < 0.7:  # few tokens, so that pairs of them come again
        bias = tuple((token, 60.0) for token in (5, 6, 7))
        sampling = replace(sampling, logit_bias=bias)
    most = chance.randrange(1, 32)
    least, stop = chance.randrange(most), frozenset(chance.sample(range(90), 6))
    return prompt, Request(most, sampling, stop, least=least, logprobs=chance.choice([None, 0, 2]))


def outcome(text: Continuation) -> tuple[Any, ...]:
    return text.tokens, text.logprobs, text.end, text.error


def alone(executor: Executor, prompt: list[int], request: Request) -> Continuation:
    engine = Engine(executor, 1, 58)
    text = engine.submit(prompt, replace(request, speculate=OFF))
    while engine.busy:
        assert engine.step().guessed_tokens == 0
    return text


@pytest.mark.parametrize("seed", range(4))
def test_a_text_has_the_tokens_that_it_has_without_guesses(
    model: Executor, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In random schedules. Log probabilities tell bits of the logits."""
    monkeypatch.setattr(model, "account", AnyRows(seed))
    chance = random.Random(seed)
    jobs = [job(chance) for _ in range(14)]
    engine, texts = Engine(model, 4, 58, piece=64, prompts_first=seed == 1), []
    totals = [0, 0, 0]
    while len(texts) < len(jobs) or engine.busy:
        if len(texts) < len(jobs) and chance.random() < 0.4:
            prompt, request = jobs[len(texts)]
            kind = chance.choice([AUTO, AUTO, 1, 5, OFF])
            texts.append(engine.submit(prompt, replace(request, speculate=kind)))
        if texts and chance.random() < 0.03:
            engine.cancel(chance.choice(texts))
        before = {text: len(text.tokens) for text in texts}
        step = engine.step()
        for text in step.advanced:
            assert text.latest == text.tokens[before[text] :]
            assert len(text.latest) == text.new <= MOST + 1
        counts = (step.guessed_tokens, step.accepted_tokens, step.guessed_tokens > 0)
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
    account = model.account
    assert account is not None
    assert totals == [account.guessed, account.accepted, account.calls]
    assert account.accepted > 4
    assert {text.end for text in texts} <= {LENGTH, STOP, CANCELLED}
    for text, (prompt, request) in zip(texts, jobs, strict=True):
        right = alone(model, prompt, request)
        if text.end == CANCELLED:
            assert text.tokens == right.tokens[: len(text.tokens)]
        else:
            assert outcome(text) == outcome(right)


def test_more_texts_than_tokens_of_a_call(
    tiny: moec.CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then none is guessed for; for half as many, one token each."""
    executor = tiny.executor
    assert isinstance(executor, Executor)
    monkeypatch.setattr(executor, "account", AnyRows(0))
    right = alone(executor, [5] * 6, Request(8)).tokens
    for count, most in ((70, 0), (32, 1)):
        engine = Engine(executor, count, 20, piece=64, prompts_first=True)
        texts = [engine.submit([5] * 6, Request(8)) for _ in range(count)]
        guessed = 0
        while engine.busy:
            step = engine.step()
            assert step.guessed_tokens <= most * count
            guessed += step.guessed_tokens
        assert (guessed > 0) == (most > 0)
        assert all(text.tokens == right for text in texts)


@pytest.fixture(scope="module")
def tiny(compiled_tiny_moe: moec.CompiledModel) -> moec.CompiledModel:
    return compiled_tiny_moe


@pytest.mark.parametrize("speculate", [1, 7, "auto"])
def test_generate_gives_the_same_text(tiny: moec.CompiledModel, speculate: int | str) -> None:
    """With a stop string, and a grammar, which is advanced by drawn tokens alone."""
    prompts = ["def f(x):\n    return f(x)\n" * 2, "import os\n"]
    for options in (
        {},
        {"temperature": 0.5, "seed": 3, "stop": ["return x"]},
        {"response_format": {"type": "regex", "regex": "(def f|x = )+"}},
    ):
        expected = tiny.generate(prompts, max_new_tokens=40, speculate="off", **options)
        assert tiny.generate(prompts, max_new_tokens=40, speculate=speculate, **options) == expected


def test_a_failure_leaves_the_tokens_before_it(tiny: moec.CompiledModel) -> None:
    """NaN in the third of the rows that are verified: two tokens come, then the error."""
    executor = tiny.executor
    assert isinstance(executor, Executor)
    prompt = [5] * 20
    engine = Engine(executor, 1, 58)
    text = engine.submit(prompt, Request(30, Sampling(logit_bias=((5, 100.0),)), speculate=7))
    engine.step()
    decode = executor.decode

    def poisoned(*arguments: Any) -> Any:
        logits = decode(*arguments)
        logits[:, 2:] = float("nan")
        return logits

    executor.decode = poisoned  # type: ignore[method-assign]
    try:
        engine.step()
    finally:
        del executor.decode  # type: ignore[method-assign]
    assert (text.end, text.tokens, text.new) == (FAILED, [5, 5, 5], 2)
    assert "after 23 tokens: the logits hold NaN" in text.error
    assert not engine.busy


@pytest.mark.parametrize("speculate", [0, 8, -1, True, "on", None])
def test_numbers_that_are_refused(speculate: Any) -> None:
    with pytest.raises(InputError, match=r"speculate is .*; it must be auto, off, or from 1 to 7"):
        Request(speculate=speculate)


def test_models_that_are_refused(speaker: Path) -> None:
    with pytest.raises(InputError, match="speculate is 2, and this model has no KV cache of its"):
        next(generate(start(read(speaker)), [[1, 2]], Request(speculate=2)))
    family = OTHER_FAMILIES["lfm2_moe"]
    model = moec.compile(family.build(), (), family.inputs(2, 7), verify=False)
    rule = "speculate is 3, and the model has recurrent states, which cannot go back"
    with pytest.raises(InputError, match=rule):
        model.generate([[1, 2]], speculate=3)
    assert model.generate([[1, 2]], max_new_tokens=2, speculate="auto")
    texts = []
    for scores in (False, True):  # the prompt is read once, or its states would go on
        engine = Engine(model.executor, 1, 40)
        texts.append(engine.submit([1, 2, 3], Request(5, logprobs=0, scores_prompt=scores)))
        while engine.busy:
            engine.step()
    assert texts[0].tokens == texts[1].tokens
    assert len(texts[1].prompt_logprobs) == 2


def test_nothing_is_guessed_while_routing_is_recorded(tiny: moec.CompiledModel) -> None:
    """A recording has the choices of the tokens of texts, not of guesses."""
    account = tiny.executor.account
    assert account is not None
    before = account.calls
    account.paused = True
    list(generate(tiny.executor, [[5] * 20], Request(20, speculate=7)))
    account.paused = False
    assert account.calls == before
    list(generate(tiny.executor, [[5] * 20], Request(20, speculate=7)))
    assert account.calls > before


def test_guesses_are_what_followed_the_last_time() -> None:
    guesses = Guesses([1, 2, 3, 4, 9, 2, 3, 5, 6, 7, 8, 1, 2])
    assert guesses.next(MOST) == [3, 4, 9, 2, 3, 5, 6]  # after 1, 2
    guesses.add(3)  # right, so that the others may be
    assert guesses.next(MOST) == [4, 9, 2, 3, 5, 6]
    assert guesses.chance == 1 / MEMORY
    guesses.add(8)  # wrong; 3, 8 never occurred
    assert guesses.next(MOST) == []
    assert guesses.chance == 1 / MEMORY * (1 - 1 / MEMORY)
    for token in (2, 3):
        guesses.add(token)
    assert guesses.next(MOST)[:2] == [8, 2]  # the latest 2, 3 was before 8 again
    assert Guesses([4, 2, 3, 5, 2, 3, 6, 4, 2, 3]).next(MOST)[:1] == [5]  # three tokens before two


def test_guesses_of_a_loop_go_on() -> None:
    assert Guesses([7, 8, 9, 7, 8, 9, 7, 8]).next(MOST) == [9, 7, 8, 9, 7, 8, 9]
    assert Guesses([7] * 4).next(MOST) == [7] * MOST
    for short in ([], [1], [1, 1], [1, 2, 3]):
        assert Guesses(short).next(MOST) == []


def times(account: Account, seconds: dict[int, float], texts: int = 1) -> None:
    for rows, duration in seconds.items():
        for _ in range(TRIALS):
            account.add(texts, rows, duration, 0, 0)


def test_guesses_are_verified_where_that_pays() -> None:
    account = Account()
    assert account.rows([(7, 1.0)]) == 1  # nothing is known yet
    times(account, {1: 1.0})
    tried = []
    for _ in range(3 * TRIALS):
        tried.append(account.rows([(7, 0.9)]))
        account.add(1, tried[-1], 1 + 0.2 * tried[-1], tried[-1] - 1, 0)
    assert tried == [2, 2, 4, 4, 8, 8]
    assert account.rows([(7, 0.9)]) == 8
    assert account.rows([(5, 0.9)]) == 4
    assert account.rows([(2, 0.9)]) == 4
    assert account.rows([(7, 0.3)]) == 1
    assert account.rows([(0, 0.0)]) == 1
    dear = Account()  # as a model is whose rows each read other experts
    times(dear, dict(zip(ROWS, (1.0, 1.9, 3.6, 6.9), strict=True)))
    assert dear.rows([(7, 0.9)]) == 1
    several = Account()
    times(several, dict(zip(ROWS, (1.0, 1.3, 1.8, 3.6), strict=True)), texts=4)
    assert several.rows([(7, 0.95)] * 4) == 4
    assert several.rows([(7, 0.95), (0, 0), (0, 0), (0, 0)]) == 1


def test_times_are_measured_again() -> None:
    account = Account()
    times(account, {1: 1.0, 2: 9.0, 4: 9.0, 8: 9.0})
    chances = [(7, 0.9)]
    tried = 0
    for _ in range(600):
        rows = account.rows(chances)
        tried += rows > 1
        account.add(1, rows, 9.0 if rows > 1 else 1.0, 0, 0)
    assert tried == 6  # each of three, twice
