"""Greedy generation: the supported models, the tokens, and the stop conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from moec.errors import ArtifactError, InputError, UsageError
from moec.runtime.call.executor import Executor
from moec.runtime.checks import check_inputs
from moec.runtime.package import Package, Port, StatePort
from moec.runtime.text.causal_lm import causal_lm
from moec.runtime.text.generate import generate
from moec.runtime.text.prompt import load_tokenizer
from moec.runtime.text.request import Request
from tests.runtime import toy


def speak(
    most: int, prompt: list[int], stop: frozenset[int] = frozenset(), **how: Any
) -> list[int]:
    tokens = generate(Executor(toy.language_model(**how)), [prompt], Request(most, stop=stop))
    return [token for (token,) in tokens if token is not None]


def test_tokens_until_there_are_enough() -> None:
    assert speak(4, [1, 5]) == [6, 7, 0, 1]


def test_tokens_until_one_that_stops() -> None:
    assert speak(99, [4], stop=frozenset([7, 3])) == [5, 6, 7]


def test_texts_of_unequal_lengths_that_end_at_different_times() -> None:
    model = Executor(toy.language_model())
    result = list(generate(model, [[1, 2, 3], [4]], Request(99, stop=frozenset([6]))))
    assert result == [(4, 5), (5, 6), (6, None)]


@pytest.mark.parametrize(
    ("prompts", "most", "words"),
    [
        ([], 1, "there is no prompt"),
        ([[]], 1, "the prompt has no tokens"),
        ([[1], []], 1, "prompt 1 has no tokens"),
        ([[1]], 0, "max_new_tokens is 0; it must be at least 1"),
        ([[1], [2] * 5], 1, "prompt 1 has 5 tokens, and the model takes at most 4"),
        ([[1, 8]], 1, "token 8 is not one of the model's 8 tokens"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts: list[list[int]], most: int, words: str) -> None:
    model = Executor(toy.language_model(longest=4))
    with pytest.raises(InputError, match=words):
        list(generate(model, prompts, Request(most)))


def test_tokens_until_the_model_takes_no_more() -> None:
    assert speak(99, [0, 1], longest=4) == [2, 3, 4]
    assert speak(1, [0, 1, 2, 3], longest=4) == [4]
    with pytest.raises(InputError, match="has 5 tokens, and the model takes at most 4"):
        speak(1, [0, 1, 2, 3, 4], longest=4)


def test_nan_is_no_likeliest_token() -> None:
    package = toy.language_model()
    table = package.arrays["table"].copy()
    table[3, 5] = np.nan
    model = Executor(replace(package, arrays={"table": table}))
    with pytest.raises(InputError, match="after 3 tokens: the logits hold NaN"):
        list(generate(model, [[1, 2]], Request(9)))


class Cached:
    """A fake executor whose model remembers its tokens: each token is passed once."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.seen: list[int] = []
        self.calls: list[int] = []

    def reset(self) -> None:
        self.seen = []

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        check_inputs(self.package.main, inputs)
        tokens, positions = inputs["input_ids"][0], inputs["cache_position"]
        assert positions.tolist() == list(range(len(self.seen), len(self.seen) + len(tokens)))
        self.seen += tokens.tolist()
        self.calls.append(len(tokens))
        return {"logits": np.eye(8, dtype=np.float32)[(tokens + 1) % 8][None]}


def test_with_a_cache_each_token_goes_in_once() -> None:
    package = toy.language_model()
    main = replace(
        package.main,
        inputs=(Port("input_ids", "i64", ("B", "S")), Port("cache_position", "i64", ("S",))),
        states=(StatePort("keys", "f32", (1, 2, 6, 4)),),
        index_ranges={"cache_position": (0, 5)},
    )
    model: Any = Cached(replace(package, functions={"main": main}))
    assert list(generate(model, [[1, 2, 3]], Request(99))) == [(4,), (5,), (6,), (7,)]
    assert model.calls == [3, 1, 1, 1]
    assert model.seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"inputs": (Port("x", "f32", ("T", 4)),)},
            ("this one takes x: f32[T, 4] and returns"),
        ),
        (
            {"outputs": (Port("y", "f32", ("B", 8)),)},
            "returns y: f32[B, 8]: give it inputs instead of a prompt",
        ),
        (
            {"outputs": (Port("last_hidden_state", "f32", ("B", "S", 64)),)},
            "returns last_hidden_state: f32[B, S, 64]: give it inputs instead of a prompt",
        ),
        (
            {"inputs": (Port("a", "i64", ("B", "S")), Port("b", "i64", ("B", "S")))},
            "only a model from tokens",
        ),
        (
            {"inputs": (Port("input_ids", "i64", ("B", "S")), Port("pixels", "f32", (3,)))},
            "gives no value for the input pixels: f32[3]",
        ),
        (
            {"inputs": (Port("input_ids", "i64", ("B", 9)),)},
            (
                "was compiled for exactly 9 tokens, and continuing text needs a sequence that "
                "may grow: compile it with a dynamic sequence"
            ),
        ),
    ],
)
def test_models_that_do_not_continue_text(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        causal_lm(replace(toy.language_model().main, **changes))
    assert words in str(caught.value)


def test_text_and_back() -> None:
    tokenizer = load_tokenizer(toy.tokenizer_files())
    assert tokenizer.encode("b c") == [1, 2]
    assert tokenizer.stop == {7}
    assert "".join(map(tokenizer.decoder([1]), [2, 3])) == " c d"
    assert tokenizer.decode([2, 3]) == "c d"
    with pytest.raises(UsageError, match="the prompt encodes to no tokens"):
        tokenizer.encode("  ")


def test_characters_come_when_they_are_whole() -> None:
    """A byte-level tokenizer gives the two bytes of an accented letter as two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    result = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    tokenizer = load_tokenizer({"tokenizer/tokenizer.json": result.to_str().encode()})
    tokens = tokenizer.encode("né!")
    assert len(tokens) == 4
    assert list(map(tokenizer.decoder(tokenizer.encode("a")), tokens)) == ["n", "", "é", "!"]


@pytest.mark.parametrize(
    ("files", "stop"),
    [
        ({"generation_config.json": {"eos_token_id": [3, 4]}}, {3, 4}),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 2}}, {2}),
        ({"generation_config.json": {}, "tokenizer_config.json": {"eos_token": "c"}}, {2}),
        (
            {
                "generation_config.json": {},
                "tokenizer_config.json": {"eos_token": {"content": "d"}},
            },
            {3},
        ),
        ({"generation_config.json": {}}, set()),
    ],
)
def test_where_the_end_of_a_text_is_written(files: dict[str, Any], stop: set[int]) -> None:
    inputs = toy.tokenizer_files()
    inputs |= {f"tokenizer/{name}": json.dumps(text).encode() for name, text in files.items()}
    assert load_tokenizer(inputs).stop == stop


def test_no_tokenizer_or_a_bad_one() -> None:
    with pytest.raises(ArtifactError, match="has no tokenizer; compile a Hugging Face"):
        load_tokenizer({})
    with pytest.raises(ArtifactError, match=r"tokenizer/tokenizer\.json is malformed"):
        load_tokenizer({"tokenizer/tokenizer.json": b"{}"})
    files = toy.tokenizer_files() | {"tokenizer/generation_config.json": b"{"}
    with pytest.raises(ArtifactError, match=r"tokenizer/generation_config\.json is malformed"):
        load_tokenizer(files)


def test_ranks_without_decode_are_refused() -> None:
    """A decoder runs `decode` alone: it has no whole text to run again."""

    @dataclass(frozen=True)
    class Ranks:
        package: Package

    model: Any = Ranks(toy.language_model())
    with pytest.raises(InputError, match="several ranks continue text with the function `decode`"):
        list(generate(model, [[1, 2]], Request(4)))
