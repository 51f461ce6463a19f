"""Beam search: the texts of transformers' `generate(num_beams=...)`, token by token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import moec
from moec.errors import InputError
from moec.runtime.call.executor import Executor
from moec.runtime.dtypes import Array
from moec.runtime.text.engine import CANCELLED, FAILED, LENGTH, STOP
from moec.runtime.text.generate import BeamEngine, BeamSearch, generate
from moec.runtime.text.request import BeamOptions, Request
from moec.runtime.text.sampling import Sampling
from tests.models.families import FAMILIES
from tests.models.other_families import OTHER_FAMILIES
from tests.runtime import toy

TEXTS = [[5, 9, 12, 7, 33, 81, 4], [100, 3], [64], [8, 20, 31, 150, 9, 11, 77], [*range(3, 60)]]
MOST = 12
WAYS: list[dict[str, Any]] = [
    {"num_beams": 4},
    {
        "num_beams": 4,
        "length_penalty": 0.3,
        "early_stopping": True,
        "num_return_sequences": 3,
        "min_new_tokens": 2,
    },
    {
        "num_beams": 3,
        "length_penalty": 2.0,
        "early_stopping": "never",
        "num_return_sequences": 2,
    },
    {"num_beams": 5, "length_penalty": -1.0, "num_return_sequences": 5},
    {"num_beams": 2, "length_penalty": 0.0, "early_stopping": "never"},
]


def new_tokens(
    model: Any, text: Sequence[int], stop: Sequence[int], way: dict[str, Any], most: int = MOST
) -> list[list[int]]:
    """Those of transformers, without what fills them up."""
    ids, ends = torch.tensor([text]), list(stop) or None
    how = {"max_new_tokens": most, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    with torch.no_grad():
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), **how, **way).tolist()
    results = [row[len(text) :] for row in rows]
    lengths = [next((n for n, t in enumerate(r, 1) if t in stop), len(r)) for r in results]
    return [result[:length] for result, length in zip(results, lengths, strict=True)]


def ours(way: dict[str, Any]) -> dict[str, Any]:
    return {{"min_new_tokens": "min_tokens"}.get(name, name): value for name, value in way.items()}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe", "lfm2_moe"])
def test_the_texts_of_transformers(name: str) -> None:
    """One text, and all together, of lengths that leave at different steps; the last model has
    convolutions, whose states move with the beams."""
    family = FAMILIES[name].one_layer() if name in FAMILIES else OTHER_FAMILIES[name]
    model = family.build()
    compiled = moec.compile(model, (), family.inputs(2, 7), verify=False)
    free = [new_tokens(model, text, (), {"num_beams": 4})[0] for text in TEXTS]
    drawn = sorted(range(160), key=lambda token: -sum(map(lambda text: text.count(token), free)))
    ended = 0
    for way in WAYS:
        for stop in ((), drawn[:1], drawn[:3]):
            new = [new_tokens(model, text, stop, way) for text in TEXTS]
            ended += sum(len(tokens) < MOST for each in new for tokens in each)
            right = [[*t, *tokens] for t, each in zip(TEXTS, new, strict=True) for tokens in each]
            options = {"max_new_tokens": MOST, "stop": stop, **ours(way)}
            assert compiled.generate(TEXTS, **options) == right, (way, stop)
            alone = compiled.generate(TEXTS[4:], **options)
            assert alone == right[-len(alone) :]
    assert ended > 30


class Table(PreTrainedModel, GenerationMixin):
    """A model whose log probabilities are a row of a table for each token."""

    config_class = PreTrainedConfig

    def __init__(self, table: Array) -> None:
        super().__init__(PreTrainedConfig(vocab_size=len(table), is_decoder=True))
        self.table = torch.from_numpy(table)
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table[input_ids])  # type: ignore[arg-type]

    def prepare_inputs_for_generation(
        self, input_ids: Any, attention_mask: Any = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}


def stable_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def test_beams_that_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of multiples of a half all sums are exact, and most scores equal others; the order of equal
    ones, which `torch.topk` leaves open, is that of their indices for both."""
    monkeypatch.setattr(torch, "topk", stable_topk)
    monkeypatch.setattr(torch.nn.functional, "log_softmax", lambda scores, dim: scores)
    monkeypatch.setattr("moec.runtime.text.generate.log_softmax", lambda logits: logits.copy())
    ends = set()
    for seed in range(80):
        draw = random.Random(seed)
        size, most = draw.randrange(12, 20), draw.randrange(1, 14)
        values = np.random.default_rng(seed).integers(1, draw.choice([2, 3, 9, 17]), (size, size))
        table = (-values / 2).astype(np.float32)
        stop = draw.sample(range(size), draw.randrange(5))
        table[:, stop] += draw.choice([0, 0.5, 1.5, 3])
        count = draw.randrange(2, 5)
        penalty = draw.choice([1.0, 0.0, 2.0, 4.0, -1.0, -0.5])
        options = BeamOptions(count, penalty, draw.choice([True, False, "never"]), count)
        least = draw.choice([0, draw.randrange(most)])
        way = {
            "num_beams": count,
            "length_penalty": options.length_penalty,
            "early_stopping": options.early_stopping,
            "num_return_sequences": count,
            "min_new_tokens": least,
            "use_cache": False,
        }
        right = new_tokens(Table(table), [3], stop, way, most)
        search = BeamSearch(
            Request(most, stop=frozenset(stop), least=least, beams=options), options
        )
        latest = [3] * count
        while not search.ended:
            search.advance(table[latest])
            latest = [tokens[-1] for tokens in search.tokens]
        assert search.sequences == right, (seed, way)
        ends |= {len(tokens) == most for tokens in right}
    assert ends == {True, False}


@pytest.fixture(scope="module")
def executor(compiled_tiny_moe: moec.CompiledModel) -> Executor:
    assert isinstance(compiled_tiny_moe.executor, Executor)
    return compiled_tiny_moe.executor


@pytest.fixture(scope="module")
def states() -> Executor:
    """A model with convolutions."""
    family = OTHER_FAMILIES["lfm2_moe"]
    compiled = moec.compile(family.build(), (), family.inputs(2, 7), verify=False)
    assert isinstance(compiled.executor, Executor)
    return compiled.executor


@pytest.mark.parametrize(("name", "room"), [("executor", 640), ("states", 60)])
def test_texts_join_leave_and_are_cancelled(
    name: str, room: int, request: pytest.FixtureRequest
) -> None:
    """Each has the tokens that it has alone, whatever slots its beams pass through."""
    executor = request.getfixturevalue(name)
    options = BeamOptions(3, 0.5, returned=3)
    draw = random.Random(0)
    jobs = [
        (
            [draw.randrange(3, 100) for _ in range(draw.choice([1, 5, 40, 40, 41, room - 20]))],
            Request(
                draw.randrange(1, 14),
                stop=frozenset(draw.sample(range(160), draw.choice([0, 5, 60]))),
                beams=options,
            ),
        )
        for _ in range(16)
    ]
    engine = BeamEngine(executor, 4, room, options)
    texts = []
    while len(texts) < len(jobs) or engine.busy:
        for _ in range(draw.choice([0, 1, 3])):
            if len(texts) < len(jobs):
                texts.append(engine.submit(*jobs[len(texts)]))
        if texts and draw.random() < 0.1:
            engine.cancel(draw.choice(texts))
        advanced = engine.step().advanced
        assert all(text.latest == (text.tokens if text.end else []) for text in advanced)
        assert engine.running <= 4
    assert {text.end for text in texts} == {STOP, LENGTH, CANCELLED}
    for text, (prompt, how) in zip(texts, jobs, strict=True):
        if text.end != CANCELLED:
            alone = zip(*generate(executor, [prompt], how), strict=True)
            sequences = [[t for t in column if t is not None] for column in alone]
            assert engine.search([text]) == sequences
            assert text.tokens == sequences[0]


class Poisoned:
    """An executor whose logits become NaN for one text."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self.number = executor, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def decode(self, counts: Any, caches: Any, requests: Array, lengths: Array) -> Array:
        logits = self._executor.decode(counts, caches, requests, lengths)
        if counts[0].shape[1] == 1:
            logits[requests == self.number, :, 7] = np.nan
        return logits


def test_nan_ends_its_text_alone(executor: Executor) -> None:
    poisoned: Any = Poisoned(executor)
    request = Request(6, beams=BeamOptions(3))
    engine = BeamEngine(poisoned, 2, 60, request.beams)
    bad, good = (engine.submit([4, 5, 6], request) for _ in range(2))
    poisoned.number = int(bad.number[0])
    with pytest.raises(InputError, match="after 4 tokens: the logits hold NaN: no beam can be"):
        engine.search([bad, good])
    assert (bad.end, good.end) == (FAILED, LENGTH)
    assert [tuple(good.tokens)] == [*zip(*generate(executor, [[4, 5, 6]], request), strict=True)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": Sampling(0.5)}, "num_beams is 4, and temperature is for texts that are"),
        ({"sampling": Sampling(repetition_penalty=2.0)}, "and repetition_penalty is for texts"),
        ({"sampling": Sampling(logit_bias=((1, 1.0),))}, "and logit_bias is for texts"),
        ({"speculate": 3}, "num_beams is 4, and speculate is for texts that are drawn token by"),
        ({"guide": object()}, "num_beams is 4, and response_format is for texts"),
        ({"draft": object()}, "num_beams is 4, and draft is for texts"),
    ],
)
def test_options_that_are_not_for_beams(changes: dict[str, Any], words: str) -> None:
    request = Request(beams=BeamOptions(4), speculate="off")
    assert replace(request, sampling=Sampling(seed=3)).beams.count == 4
    with pytest.raises(InputError, match=words):
        replace(request, **changes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "num_beams is 0; it must be a whole number, at least 1"),
        ({"count": 2.0}, "num_beams is 2.0; it must be a whole number"),
        ({"count": True}, "num_beams is True; it must be a whole number"),
        ({"count": 2, "length_penalty": "1"}, "length_penalty is '1'; it must be a number from -1"),
        ({"count": 2, "length_penalty": 11}, "length_penalty is 11; it must be a number from -10"),
        ({"count": 2, "length_penalty": float("nan")}, "length_penalty is nan; it must be a num"),
        ({"count": 2, "early_stopping": "often"}, "is 'often'; it must be True, False or \"never"),
        ({"count": 2, "returned": 3}, "num_return_sequences is 3; it must be at most num_beams, 2"),
        ({"count": 2, "returned": 0}, "num_return_sequences is 0; it must be a whole number"),
        ({"count": 1, "returned": 2}, "num_return_sequences is 2; it must be at most num_beams"),
        ({"count": 1, "length_penalty": 2.0}, "length_penalty is for beam search, and num_beams"),
        ({"count": 1, "early_stopping": True}, "early_stopping is for beam search, and num_beams"),
    ],
)
def test_options_of_beams(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        BeamOptions(**options)
    assert words in str(caught.value)


def test_a_model_without_a_cache_is_refused() -> None:
    model = Executor(toy.language_model())
    with pytest.raises(InputError, match="num_beams is 4, and this model has no KV cache of its"):
        list(generate(model, [[1]], Request(4, beams=BeamOptions(4))))
