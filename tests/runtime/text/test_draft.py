"""A smaller model guesses: tokens are those without it, whatever it guesses."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec
from moec.errors import InputError
from moec.runtime.call.account import Account
from moec.runtime.call.executor import Executor
from moec.runtime.text.engine import Engine
from moec.runtime.text.request import AUTO, OFF, Request
from moec.runtime.text.speculation.draft import FIRST_CHANCE, MOST, Draft
from tests.command_line import invoke
from tests.models.families import FAMILIES
from tests.models.other_families import OTHER_FAMILIES
from tests.runtime.text.test_speculation import AnyRows, alone, job, outcome, times

VOCABULARY = 1024


class Sometimes:
    """A model that says something else than another in a share of its calls."""

    def __init__(self, model: Executor, wrong: float) -> None:
        self._model, self._wrong, self._random = model, wrong, random.Random(0)
        self.calls: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def decode(self, counts: Any, *others: Any) -> Any:
        self.calls.append(counts[0].shape[1])
        logits = self._model.decode(counts, *others)
        return np.roll(logits, 1, -1) if self._random.random() < self._wrong else logits


@pytest.fixture(scope="module")
def tiny(compiled_tiny_moe: moec.CompiledModel) -> Executor:
    assert isinstance(compiled_tiny_moe.executor, Executor)
    return compiled_tiny_moe.executor


def draft_of(model: Any) -> Draft:
    generation = model.package.generation
    return Draft(model, generation.vocabulary)


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_a_text_has_the_tokens_that_it_has_alone(
    tiny: Executor, wrong: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In random schedules; with log probabilities, which tell bits."""
    monkeypatch.setattr(tiny, "account", AnyRows(seed))
    draft, chance = draft_of(Sometimes(tiny, wrong)), random.Random(seed)
    jobs = [job(chance) for _ in range(8)]
    engine, texts, accepted = Engine(tiny, 3, 58, piece=64), [], 0
    while len(texts) < len(jobs) or engine.busy:
        if len(texts) < len(jobs) and chance.random() < 0.5:
            prompt, request = jobs[len(texts)]
            kind = chance.choice([AUTO, 1, 5, OFF])
            small = draft if chance.random() < 0.8 else None
            texts.append(engine.submit(prompt, replace(request, speculate=kind, draft=small)))
        accepted += engine.step().accepted_tokens
    for text, (prompt, request) in zip(texts, jobs, strict=True):
        assert outcome(text) == outcome(alone(tiny, prompt, request))
    assert accepted > 0 or wrong == 1


def test_a_draft_that_is_right_saves_steps(tiny: Executor) -> None:
    """All guesses of a model for itself are drawn. The draft reads each token once."""
    small = Sometimes(tiny, 0.0)
    engine = Engine(tiny, 1, 64)
    text = engine.submit([9, 300, 17, 52], Request(25, speculate=7, draft=draft_of(small)))
    steps = 0
    while engine.busy:
        step = engine.step()
        assert step.accepted_tokens == step.guessed_tokens
        steps += 1
    assert len(text.tokens) == 25
    assert steps == 1 + 3  # the prompt, and three calls of eight tokens
    assert sum(small.calls) <= 4 + 25
    assert text.tokens == alone(tiny, [9, 300, 17, 52], Request(25)).tokens


def test_a_wrong_guess_is_forgotten(tiny: Executor) -> None:
    draft = draft_of(tiny)
    guesses = draft.guesses([9, 300, 17, 52], None, 64)
    assert guesses.count == MOST
    first = guesses.next(3)
    assert guesses.next(2) == first[:2]
    guesses.add(first[0])
    assert guesses.next(2) == first[1:]
    right = FIRST_CHANCE + (1 - FIRST_CHANCE) / 16
    assert draft.chance == pytest.approx(right)
    other = (first[1] + 1) % VOCABULARY
    guesses.add(other)
    assert draft.chance == pytest.approx(right * 15 / 16)
    afresh = draft.guesses([9, 300, 17, 52, first[0], other], None, 64)
    assert guesses.next(4) == afresh.next(4)


def test_guesses_end_where_the_draft_does(tiny: Executor) -> None:
    draft = draft_of(tiny)
    draft.longest = 6
    guesses = draft.guesses([5] * 4, None, 64)
    assert (guesses.count, len(guesses.next(MOST))) == (2, 2)
    for token in (1, 2, 3):
        guesses.add(token)
    assert (guesses.count, guesses.next(MOST)) == (0, [])


def test_a_draft_that_costs_more_than_it_saves_is_not_asked() -> None:
    account = Account()
    times(account, {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4})
    assert account.rows([(7, 0.8)]) == 8
    assert account.rows([(7, 0.8)], cost=0.2) == 4
    assert account.rows([(7, 0.8)], cost=0.9) == 1


def small_model(seed: int = 0, name: str = "olmoe") -> moec.CompiledModel:
    torch.manual_seed(seed)
    model: moec.CompiledModel = moec.compile(
        FAMILIES[name].one_layer().build(), (torch.randint(3, 160, (2, 7)),), verify=False
    )
    return model


def test_generate_with_a_draft() -> None:
    model, small = small_model(0), small_model(1)
    prompts = [[5, 6, 7], [9, 10]]
    expected = model.generate(prompts, max_new_tokens=12)
    assert model.generate(prompts, max_new_tokens=12, draft=small, speculate=4) == expected
    options = {"temperature": 0.7, "seed": 3, "max_new_tokens": 12}
    sampled = model.generate(prompts, **options)
    assert model.generate(prompts, draft=small, speculate=4, **options) == sampled
    with pytest.raises(InputError, match=r"draft is 'x'; give a model: moec.load\(path\)"):
        model.generate(prompts, draft="x")


def test_drafts_that_are_refused(compiled_tiny_moe: moec.CompiledModel) -> None:
    model = small_model()
    with pytest.raises(InputError, match="the draft has 1024 tokens and the model 160: take one"):
        model.generate([[1, 2]], draft=compiled_tiny_moe)
    family = OTHER_FAMILIES["lfm2_moe"]
    states = moec.compile(family.build(), (), family.inputs(2, 7), verify=False)
    with pytest.raises(InputError, match="the draft has recurrent states, which cannot go back"):
        model.generate([[1, 2]], draft=states)
    with pytest.raises(InputError, match="a draft was given, and the model has recurrent states"):
        states.generate([[1, 2]], draft=model)
    with_cache = small_model(name="mixtral")
    plain = moec.compile(
        FAMILIES["mixtral"].one_layer().build(), (torch.randint(3, 160, (2, 7)),), verify=False,
        kv_cache=False,
    )  # fmt: skip
    with pytest.raises(InputError, match="the draft does not continue texts: the model was compil"):
        with_cache.generate([[1, 2]], draft=plain)
    with pytest.raises(InputError, match="a draft is of no use without a KV cache: the model was"):
        plain.generate([[1, 2]], draft=with_cache)


def test_the_command(compiled_tiny_moe: moec.CompiledModel, tmp_path: Path) -> None:
    path = str(tmp_path / "m.moec")
    compiled_tiny_moe.save(path)
    words = ["run", path, "--prompt", "def f(x):", "--max-new-tokens", "12"]
    plain = invoke(*words, "--json")
    drafted = invoke(*words, "--json", "--speculate", "4", "--draft", path)
    assert drafted.exit_code == 0, drafted.output
    first, second = (json.loads(result.stdout) for result in (plain, drafted))
    assert first["text"] == second["text"]
    assert second["speculation"]["accepted"] == second["speculation"]["guessed"] > 0
