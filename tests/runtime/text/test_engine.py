"""Continuous batching: every text has the bits that it has alone, whatever joins, leaves, ends."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.errors import InputError, UsageError
from moec.runtime.artifact.artifact import read
from moec.runtime.call.caches import Cache
from moec.runtime.call.executor import Executor, start
from moec.runtime.dtypes import Array
from moec.runtime.expert_store.device import DIRECT
from moec.runtime.expert_store.native import StoreOptions
from moec.runtime.expert_store.start import start_with_slots
from moec.runtime.package import Package, carries
from moec.runtime.text.engine import CANCELLED, FAILED, LENGTH, STOP, Continuation, Engine
from moec.runtime.text.generate import generate
from moec.runtime.text.request import Request
from moec.runtime.text.sampling import Sampling
from moec.runtime.text.texts import PIECE, Decoder
from tests.models.other_families import OTHER_FAMILIES
from tests.once import Once
from tests.runtime.expert_store.models import LAYERS, artifact

ROOM = {"cache": 720, "states": 60, "disk": 60}


class Traced:
    """An executor with the logits of each text, by its number; those of `poisoned` become NaN."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.logits: dict[int, list[bytes]] = defaultdict(list)
        self.poisoned: set[int] = set()
        self.fails: BaseException | None = None
        self.least = 0  # tokens of a text in a call that fails

    holds_all_texts = True
    account = None  # so that each text has a row of logits for each of its tokens

    @property
    def package(self) -> Package:
        return self.executor.package

    def number_requests(self, count: int) -> Array:
        return self.executor.number_requests(count)

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        """Full of NaN where caches grow, so that no result may depend on what was there before."""
        caches = self.executor.new_caches(texts, room)
        for port, cache in zip(self.package.functions["decode"].caches, caches, strict=True):
            if len(port.shape) == 4 and isinstance(port.shape[2], str) and port.dtype == "f32":
                np.from_dlpack(cache.tensor)[...] = np.nan
        return caches

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        if self.fails is not None and lengths.max() >= self.least:
            raise self.fails
        logits = self.executor.decode(counts, caches, requests, lengths)
        for number, row in zip(requests.tolist(), logits[:, 0], strict=True):
            self.logits[number].append(row.tobytes())
            if number in self.poisoned:
                row[...] = np.nan
        return logits


@pytest.fixture(scope="module")
def cached(compiled_tiny_moe: moec.CompiledModel) -> Executor:
    assert isinstance(compiled_tiny_moe.executor, Executor)
    return compiled_tiny_moe.executor


@pytest.fixture(scope="module", params=ROOM)
def model(request: pytest.FixtureRequest, once: Once) -> tuple[Executor, int]:
    """Attention alone; convolutions too, whose states forbid padding; experts on disk."""
    kind = request.param
    executor: Any
    if kind == "cache":
        executor = request.getfixturevalue("cached")
    elif kind == "states":
        family = OTHER_FAMILIES["lfm2_moe"]
        executor = moec.compile(family.build(), (), family.inputs(2, 7), verify=False).executor
        assert carries(executor.package.functions["decode"])
    else:
        opened = read(artifact(once, None))
        executor = start_with_slots(opened, [2] * LAYERS, DIRECT, StoreOptions())
    return executor, ROOM[kind]


def job(random: random.Random, room: int) -> tuple[list[int], Request]:
    """Prompts of one token, of few, of one call and of two, which begin alike; half of the texts
    are sampled."""
    longest = room - 30
    sizes = [1, 2, 7, 7, 15, 16, 29, 40, 47, 64, 96, 97, 200, 201, PIECE + 3, PIECE + 170]
    length = min(random.choice(sizes), longest)
    alike = random.choice([0, 10, 40, 64, 150, 600])
    prompt = [n % 90 + 3 if n < alike else random.randrange(3, 100) for n in range(length)]
    draws = Sampling(1.5, 0.95, None, random.randrange(5))
    sampling = random.choice([Sampling(), draws])
    stop = frozenset(random.sample(range(100), 2))
    return prompt, Request(random.randrange(1, 30), sampling, stop)


def run(engine: Engine, jobs: list[tuple[list[int], Request]], seed: int) -> list[Continuation]:
    """Texts that join and are cancelled at random steps."""
    chance = random.Random(seed)
    texts: list[Continuation] = []
    while len(texts) < len(jobs) or engine.busy:
        if len(texts) < len(jobs) and chance.random() < 0.4:
            texts.append(engine.submit(*jobs[len(texts)]))
        if texts and chance.random() < 0.08:
            engine.cancel(chance.choice(texts))
        engine.step()
        assert engine.running <= engine.slots
    return texts


WAYS: list[dict[str, Any]] = [
    {},
    {"prompts_first": True},
    {"piece": 64},
    {"piece": 100, "prompts_first": True},
    {"prefix_tokens": 4096},
    {"prefix_tokens": 200, "piece": 128},  # of which blocks leave
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "default")
def test_a_text_has_the_bits_that_it_has_alone(
    model: tuple[Executor, int], way: dict[str, Any]
) -> None:
    executor, room = model
    seed = WAYS.index(way)
    if carries(executor.package.functions["decode"]):  # their bits depend on the parts of a prompt
        way = {name: value for name, value in way.items() if name != "piece"}
    jobs = [job(random.Random(100 * seed + n), room) for n in range(16)]
    traced = Traced(executor)
    engine = Engine(traced, 4, room, **way)
    texts = run(engine, jobs, seed)
    if "prefix_tokens" in way and room > 100:
        assert sum(text.reused > 0 for text in texts) > 1
    ends = [text.end for text in texts]
    assert LENGTH in ends
    assert set(ends) <= {LENGTH, STOP, CANCELLED}
    for text, (prompt, request) in zip(texts, jobs, strict=True):
        alone = Traced(executor)
        tokens = [token for (token,) in generate(alone, [prompt], request)]
        count = len(text.tokens)
        assert text.tokens == tokens[:count]
        assert count == len(tokens) or text.end == CANCELLED
        (logits,) = alone.logits.values()
        # before them are those of the parts of the prompt but the last
        company = traced.logits[int(text.number[0])]
        assert count == 0 or company[len(company) - count :] == logits[-len(tokens) :][:count]


def test_smaller_calls_give_the_same_tokens(cached: Executor) -> None:
    prompt = [n % 90 + 3 for n in range(150)]
    alone = [token for (token,) in generate(cached, [prompt], Request(8))]
    engine = Engine(cached, 2, 200, piece=64)
    first = engine.submit([5], Request(20))
    text = engine.submit(prompt, Request(8))
    sizes = []
    while not text.end:
        before = len(first.tokens)
        sizes.append(engine.step().prompt_tokens)
        assert len(first.tokens) == before + 1 or first.end  # no prompt stops the other text
    assert [size for size in sizes if size] == [1, 64, 32, 54]  # the last has 32 tokens or more
    assert text.tokens == alone


def test_texts_of_a_batch_have_the_tokens_that_they_have_alone(cached: Executor) -> None:
    """40 texts: one call for all had few rows of each."""
    random_ = random.Random(5)
    prompts = [[random_.randrange(3, 99) for _ in range(17 + 2 * n)] for n in range(40)]
    batch = zip(*generate(cached, prompts, Request(12)), strict=True)
    for prompt, tokens in zip(prompts, batch, strict=True):
        assert list(tokens) == [token for (token,) in generate(cached, [prompt], Request(12))]


def test_short_prompts_are_read_together(cached: Executor) -> None:
    engine = Engine(cached, 8, 720, prompts_first=True)
    for size in (40, 9, 50, 33, 9, 80, 600):
        engine.submit([5] * size, Request(3))
    sizes = []
    while engine.busy:
        sizes.append(engine.step().prompt_tokens)
    # 40 and 50 together, but not 33: the longest is at most a third longer than the shortest
    assert sizes == [90, 18, 33, 80, 512, 88, 0, 0]


def test_prompts_of_few_rows_are_read_with_none_of_more(cached: Executor) -> None:
    """Padded to the other's rows, one of two would run the kernel of many rows."""
    for size in range(3, 32):
        prompts = [[n % 90 + 3 for n in range(size + more)] for more in (0, size // 3)]
        traced = Traced(cached)
        engine = Engine(traced, 2, 64, prompts_first=True)
        texts = [engine.submit(prompt, Request(1)) for prompt in prompts]
        while engine.busy:
            engine.step()
        for text, prompt in zip(texts, prompts, strict=True):
            alone = Traced(cached)
            list(generate(alone, [prompt], Request(1)))
            assert [traced.logits[int(text.number[0])]] == [*alone.logits.values()]


def test_what_is_known_of_a_prompt_is_not_computed_again(cached: Executor) -> None:
    engine = Engine(cached, 2, 300, prefix_tokens=1024)

    def speak(prompt: list[int]) -> tuple[int, int, list[int]]:
        text, count = engine.submit(prompt, Request(5)), 0
        while not text.end:
            count += engine.step().prompt_tokens
        alone = [token for (token,) in generate(cached, [prompt], Request(5))]
        assert text.tokens == alone
        return text.reused, count, text.tokens

    prompt = [n % 90 + 3 for n in range(200)]
    assert speak(prompt)[:2] == (0, 200)
    reused, count, tokens = speak(prompt)
    assert (reused, count) == (160, 40)  # of which 32 tokens or more are read anew
    assert speak(prompt + tokens + [7] * 40)[:2] == (192, 53)
    assert speak(prompt[:64])[:2] == (32, 32)
    assert speak(prompt[:31])[:2] == (0, 31)
    assert speak([9, *prompt])[:2] == (0, 201)


def test_the_blocks_that_were_used_last_remain(cached: Executor) -> None:
    engine = Engine(cached, 1, 200, prefix_tokens=128)  # four blocks

    def count_reused(token: int, size: int) -> int:
        text = engine.submit([token] * size, Request(1))
        while not text.end:
            engine.step()
        return text.reused

    assert [count_reused(5, 96), count_reused(6, 40), count_reused(5, 96)] == [
        0,
        0,
        64,
    ]  # three and one
    assert count_reused(7, 64) == 0  # makes room by 6, then by the last of 5
    assert [count_reused(5, 96), count_reused(6, 64)] == [64, 0]
    assert count_reused(8, 200) == 0  # more than there is room for
    assert count_reused(8, 200) == 128


def test_a_text_of_nan_ends_alone(cached: Executor) -> None:
    traced = Traced(cached)
    engine = Engine(traced, 3, 64)
    texts = [engine.submit([n + 5], Request(6)) for n in range(3)]
    for _ in range(4):
        engine.step()
    traced.poisoned = {int(texts[0].number[0])}
    while engine.busy:
        engine.step()
    assert [text.end for text in texts] == [FAILED, LENGTH, LENGTH]
    assert "after 5 tokens: the logits hold NaN" in texts[0].error
    for n in (1, 2):
        assert texts[n].tokens == [t for (t,) in generate(cached, [[n + 5]], Request(6))]


def test_a_cancelled_text_frees_its_slot_at_once(cached: Executor) -> None:
    engine = Engine(cached, 1, 64)
    first, second, third = (engine.submit([n + 5], Request(9)) for n in range(3))
    engine.step()
    engine.step()
    assert (engine.running, engine.cached, len(engine.waiting)) == (1, 2, 2)
    engine.cancel(second)  # as it waits
    engine.cancel(first)  # as it decodes
    assert (engine.running, engine.cached, len(engine.waiting)) == (0, 0, 1)
    engine.step()
    engine.cancel(first)
    assert len(third.tokens) == 1
    long = Engine(cached, 2, 120, piece=64)
    text = long.submit(range(3, 103), Request(9))
    long.step()
    long.cancel(text)  # as its prompt is processed
    assert not long.busy
    assert long.cached == 0


@pytest.mark.parametrize(
    ("prompt", "most", "words"),
    [
        ([], 1, "the prompt has no tokens"),
        ([5] * 60, 6, "the prompt has 60 tokens and 6 more may follow, and a text has at most 64"),
        ([1024], 1, "token 1024 is not one of the model's 1024 tokens"),
        ([-1], 1, "token -1 is not one of the model's 1024 tokens"),
    ],
)
def test_prompts_that_are_refused(
    cached: Executor, prompt: list[int], most: int, words: str
) -> None:
    engine = Engine(cached, 2, 64)
    text = engine.submit([5] * 60, Request(4))
    with pytest.raises(InputError, match=words):
        engine.submit(prompt, Request(most))
    while engine.busy:
        engine.step()
    assert text.end == LENGTH


def test_models_and_sizes_that_are_refused(cached: Executor, speaker: Path) -> None:
    without: Decoder = start(read(speaker))
    with pytest.raises(InputError, match="cannot be batched continuously: the model was compiled"):
        Engine(without, 2, 8)
    with pytest.raises(InputError, match="processes 63 tokens of a prompt: at least 64"):
        Engine(cached, 2, 64, piece=63)
    with pytest.raises(UsageError, match=r"2 slots of 1025 tokens.* takes at most 1024"):
        Engine(cached, 2, 1025)


def test_choices_draw_from_streams_of_their_own(cached: Executor) -> None:
    request = Request(8, Sampling(1.5, seed=3))
    engine = Engine(cached, 4, 64)
    texts = [engine.submit([9, 8], request, index) for index in range(3)]
    while engine.busy:
        engine.step()
    drawn = zip(*generate(cached, [[9, 8]] * 3, request), strict=True)
    assert [text.tokens for text in texts] == list(map(list, drawn))


def test_a_step_that_fails_ends_the_texts_in_it_and_no_others(cached: Executor) -> None:
    """As a disk does where experts are read from it."""
    traced = Traced(cached)
    engine = Engine(traced, 2, 60)
    prompt, request = [5, 6, 7], Request(8)
    right = [token for (token,) in generate(cached, [prompt], request)]
    texts = [engine.submit(prompt, request) for _ in range(5)]
    for _ in range(3):
        engine.step()
    traced.fails = RuntimeError("the disk is gone")
    assert set(engine.step().advanced) == set(texts[:4])  # two decode, and two come to join
    assert {text.end for text in texts[:4]} == {FAILED}
    assert {text.error for text in texts[:2]} == {"after 6 tokens: RuntimeError: the disk is gone"}
    assert engine.failed_calls == 2
    traced.fails = None
    while engine.busy:
        engine.step()
    assert texts[4].tokens == right
    assert engine.failed_calls == 0


def test_a_prompt_whose_call_fails_ends_alone(cached: Executor) -> None:
    traced = Traced(cached)
    engine = Engine(traced, 3, 60)
    right = [token for (token,) in generate(cached, [[5, 6, 7]], Request(8))]
    text = engine.submit([5, 6, 7], Request(8))
    engine.step()
    other = engine.submit([9] * 20, Request(8))
    traced.fails, traced.least = MemoryError(), 20
    engine.step()
    assert other.error == "after 20 tokens: MemoryError: MemoryError"
    while engine.busy:
        engine.step()
    assert (text.tokens, text.end) == (right, LENGTH)


class Planted:
    """A guide without rules that raises at one of its uses."""

    def __init__(self, where: str, error: BaseException, left: int = 3) -> None:
        self.where, self.error, self.left = where, error, left

    def _meet(self, where: str) -> None:
        self.left -= where == self.where
        if self.left == 0:
            raise self.error

    def copy(self) -> Planted:
        return Planted(self.where, self.error)

    def restrict(self, logits: Array) -> Array:
        self._meet("restrict")
        return logits

    def advance(self, token: int) -> bool:
        self._meet("advance")
        return False


class PanicException(BaseException):
    """As a library written in Rust raises it."""


ERRORS = [ValueError("x"), MemoryError(), IndexError("x\ny"), PanicException("at x.rs"), OSError(5)]


@pytest.mark.parametrize("where", ["restrict", "advance"])
@pytest.mark.parametrize("error", [*ERRORS, KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_a_grammar_raises_ends_its_text_alone(
    cached: Executor, where: str, error: BaseException
) -> None:
    traced = Traced(cached)
    engine = Engine(traced, 3, 64)
    texts = [
        engine.submit([n + 5], Request(6, guide=Planted(where, error) if n == 1 else None))
        for n in range(3)
    ]

    def run() -> None:
        while engine.busy:
            engine.step()

    thread = threading.Thread(target=run)  # as the engine of a server; Ctrl-C is not meant for it
    thread.start()
    thread.join()
    assert [text.end for text in texts] == [LENGTH, FAILED, LENGTH]
    assert texts[1].error.startswith(f"after 3 tokens: {type(error).__name__}: ")
    assert "\n" not in texts[1].error
    assert texts[1].cause is error
    for n in (0, 2):
        alone = Traced(cached)
        assert texts[n].tokens == [t for (t,) in generate(alone, [[n + 5]], Request(6))]
        assert traced.logits[int(texts[n].number[0])] == next(iter(alone.logits.values()))


@pytest.mark.parametrize("error", [*ERRORS, KeyboardInterrupt()], ids=repr)
def test_what_is_raised_in_a_text_reaches_its_caller(
    cached: Executor, error: BaseException
) -> None:
    request = Request(6, guide=Planted("advance", error))
    with pytest.raises(type(error)) as caught:
        list(generate(cached, [[5]], request))
    assert caught.value is error
