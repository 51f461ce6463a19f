"""Text from a compiled model through the user interface: the tokens of Hugging Face, and more."""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import inspect
import json
import pickle
import random
import socket
import string
import textwrap
import threading
import typing
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moec
from moec.errors import InputError, MoecError, UsageError
from moec.runtime.text.texts import PIECE, Texts
from tests.capture.modules import WIDTH, Moe
from tests.models.families import FAMILIES

NEW = 24


@pytest.fixture(scope="module")
def eager(tiny_moe: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_moe).eval()


@pytest.fixture(scope="module")
def compiled(compiled_tiny_moe: moec.CompiledModel) -> moec.CompiledModel:
    return compiled_tiny_moe


@pytest.fixture(scope="module")
def loaded(
    compiled: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory
) -> moec.LoadedModel:
    path = tmp_path_factory.mktemp("generation") / "tiny.moec"
    compiled.save(path)
    return moec.load(path)


@pytest.fixture(scope="module")
def prompts(tiny_moe: Path) -> list[list[int]]:
    """Twenty pieces of Python's own library, of 40 to 170 tokens: what the model was trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    modules = (json, textwrap, argparse, ast, csv, random, socket, string, typing, zipfile)
    return [
        tokenizer(inspect.getsource(module)[200 * n : 200 * n + 120 + 7 * n]).input_ids
        for n, module in enumerate(modules * 2, 1)
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty_alpha": 3}, "without an option 'penalty_alpha'; the options are max_"),
        (
            {"num_beams": 4, "top_p": 0.5, "temperature": 1},
            "num_beams is 4, and temperature is for",
        ),
        ({"num_beams": 4, "stop": "a"}, "num_beams is 4, and stop 'a' is for texts that are drawn"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2; it must be at most num_beams"),
        ({"max_tokens": 3}, "an option 'max_tokens'; did you mean 'max_new_tokens'?"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'; it must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number, or omitted"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"top_k": "5", "temperature": 1}, "top_k is '5'; it must be a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"stop": 1.5}, "stop is 1.5; it must be a token, a string, or a list of them"),
        ({"stop": [1, 1.5]}, "stop is [1, 1.5]; it must be a token, a string, or a list of them"),
        ({"stop": "a"}, "stop is 'a': a string ends prompts that are text, not tokens"),
    ],
)
def test_odd_options(loaded: moec.LoadedModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MoecError) as caught:
        loaded.generate([[1, 2]], **options)
    assert words in str(caught.value)


def test_beams_are_no_stream(loaded: moec.LoadedModel) -> None:
    with pytest.raises(InputError, match="num_beams is 2, and stream yields tokens as they come"):
        loaded.stream([[1, 2]], num_beams=2)


def test_sequences_of_beams_have_the_form_of_the_prompts(loaded: moec.LoadedModel) -> None:
    """Text, lists, tensors: the sequences of a prompt are adjacent, the best first."""
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3}
    prompts = ["def main(", "import os, "]
    tokens = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    three = loaded.generate(tokens, **options, num_return_sequences=3)
    assert [row[: len(t)] for row, t in zip(three[::3], tokens, strict=True)] == tokens
    assert len({*map(tuple, three)}) == 6
    assert loaded.generate(tokens, **options) == three[::3]
    texts = loaded.generate(prompts, **options, num_return_sequences=3)
    assert texts[:3] == loaded.generate(prompts[0], **options, num_return_sequences=3)
    assert texts[3] == loaded.generate(prompts[1], **options)
    new = [row[len(tokens[n // 3]) :] for n, row in enumerate(three)]
    decoded = [prompts[n // 3] + loaded.tokenizer.decode(row) for n, row in enumerate(new)]
    assert texts == decoded
    tensor = loaded.generate(torch.tensor(tokens[:1]), **options, num_return_sequences=3)
    assert tensor.tolist() == three[:3]


def test_numbers_of_numpy_are_options(loaded: moec.LoadedModel) -> None:
    options = {"max_new_tokens": np.int64(2), "temperature": np.float32(0.5), "seed": np.int32(1)}
    assert len(loaded.generate([[1, 2]], **options)[0]) <= 4
    beams = {"num_beams": np.int64(2), "num_return_sequences": np.int32(2)}
    texts = loaded.generate([[1, 2]], max_new_tokens=4, length_penalty=np.float32(0.5), **beams)
    assert len(texts) == 2


def test_a_model_is_neither_pickled_nor_copied(
    compiled: moec.CompiledModel, loaded: moec.LoadedModel
) -> None:
    for model, words in ((compiled, "save it, and use moec.load on the"), (loaded, "moec.load('")):
        for act in (pickle.dumps, copy.deepcopy, copy.copy):
            with pytest.raises(UsageError) as caught:
                act(model)
            assert words in str(caught.value)


def test_the_tokens_of_hugging_face(short_moe: Path, prompts: list[list[int]]) -> None:
    """In float32; in bf16 eager and moec round otherwise, and a near tie goes either way."""
    eager = AutoModelForCausalLM.from_pretrained(short_moe, dtype=torch.float32).eval()
    model = moec.compile(short_moe, dtype="float32", verify=False)
    with torch.no_grad():
        expected = [
            eager.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0].tolist()
            for prompt in prompts
        ]
    assert [model.generate([prompt], max_new_tokens=NEW)[0] for prompt in prompts] == expected
    assert model.generate(prompts, max_new_tokens=NEW) == expected


def test_a_batch_in_bf16(loaded: moec.LoadedModel, prompts: list[list[int]]) -> None:
    alone = [loaded.generate([prompt], max_new_tokens=NEW)[0] for prompt in prompts[:6]]
    assert loaded.generate(prompts[:6], max_new_tokens=NEW) == alone


def test_a_tensor_gives_a_tensor(compiled: moec.CompiledModel) -> None:
    ids = torch.randint(3, 1024, (2, 5))
    tokens = compiled.generate(ids, max_new_tokens=4)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 9)
    assert torch.equal(tokens[:, :5], ids)
    as_numpy = compiled.generate(ids.numpy(), max_new_tokens=4)
    assert isinstance(as_numpy, np.ndarray)
    assert as_numpy.tolist() == tokens.tolist()
    streamed = list(compiled.stream(ids, max_new_tokens=4))
    assert torch.tensor(streamed).T.tolist() == tokens[:, 5:].tolist()


def test_a_text_that_ends_early_is_filled_up(compiled: moec.CompiledModel) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 300]])
    free = compiled.generate(ids, max_new_tokens=8, stop=())
    last = int(free[0, 5])
    assert last not in free[1, 4:].tolist()
    tokens = compiled.generate(ids, max_new_tokens=8, stop=last)
    assert tokens[0].tolist() == [*free[0, :6].tolist(), *[last] * 6]
    assert tokens[1].tolist() == free[1].tolist()
    lists = compiled.generate(ids.tolist(), max_new_tokens=8, stop=[last])
    assert [len(text) for text in lists] == [6, 12]


def test_draws_are_repeated_by_their_seed(compiled: moec.CompiledModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 200, "stop": ()}
    first = compiled.generate([[5, 6]], seed=1, **options)
    assert compiled.generate([[5, 6]], seed=1, **options) == first
    assert compiled.generate([[5, 6]], seed=2, **options) != first


def test_a_long_prompt_goes_through_in_pieces(
    compiled: moec.CompiledModel, eager: PreTrainedModel
) -> None:
    """Tolerance: that of verification in bf16, against the model over all tokens at once."""
    ids = torch.randint(3, 1024, (1, PIECE + 200))
    texts = Texts(compiled.executor, 1, ids.shape[1])  # type: ignore[arg-type]
    result = torch.from_numpy(texts.feed(ids.tolist()))
    with torch.no_grad():
        expected = eager(ids).logits[:, -1].float()
    assert (result - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_up_to_the_last_place(compiled: moec.CompiledModel) -> None:
    """The model has 1024 places; texts that are full stay while others go on."""
    full, other = [7] * 1022, [8] * 3
    tokens = compiled.generate([full, other], max_new_tokens=6, stop=())
    assert [len(text) for text in tokens] == [1025, 9]
    assert tokens[1] == compiled.generate([other], max_new_tokens=6, stop=())[0]
    with pytest.raises(InputError, match="the prompt has 1025 tokens, and the model takes at most"):
        compiled.generate([[7] * 1025])


def test_many_threads_at_one_model(loaded: moec.LoadedModel, prompts: list[list[int]]) -> None:
    texts = prompts[:8]
    alone = [loaded.generate([text], max_new_tokens=8) for text in texts]
    results: list[Any] = [None] * len(texts)

    def speak(position: int) -> None:
        results[position] = loaded.generate([texts[position]], max_new_tokens=8)

    threads = [threading.Thread(target=speak, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == alone


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        ([1, 2], {}, "the prompts are one list of token ids: give a list of such lists"),
        (7, {}, "the prompts are a 7, expected text, token ids"),
        (
            torch.tensor([1, 2]),
            {},
            r"the prompts are a Tensor \[2\], expected text, token ids \[B, S\]",
        ),
        ([[1, 2.5]], {}, r"prompt 0 is \[1, 2.5\], expected a list of token ids"),
        ([[1, 1024]], {}, "token 1024 is not one of the model's 1024 tokens"),
        ([[1, -1]], {}, "token -1 is not one of the model's 1024 tokens"),
        ([[1]], {"temperature": -1}, "temperature is -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_cannot_be_continued(
    compiled: moec.CompiledModel, inputs: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        compiled.generate(inputs, **options)


class Bag(nn.Module):
    """A language model with a mean over tokens, which therefore cannot come in chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        self.moe = Moe()
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        x = x + x.mean(1, keepdim=True)
        return self.head(self.moe(x.reshape(-1, WIDTH)).reshape(x.shape))  # type: ignore[no-any-return]


def test_a_model_without_a_cache_says_why_and_runs_the_whole_text() -> None:
    ids = torch.tensor([[1, 2, 3]])
    compiled = moec.compile(Bag(), (ids,))
    assert "decode" not in compiled.module
    (declined,) = [d for d in compiled.declined if d.rule == "decode"]
    assert declined.reason == "aten.mean.dim at mean mixes tokens"
    with pytest.warns(
        UserWarning,
        match="again, as there is no KV cache: aten.mean",
    ):
        tokens = compiled.generate([[1, 2, 3], [4]], max_new_tokens=3)
    text = [1, 2, 3]
    for _ in range(3):
        text.append(int(compiled(torch.tensor([text]))[0, -1].argmax()))
    assert tokens[0] == text


def test_the_cache_can_be_left_out() -> None:
    family = FAMILIES["qwen3_moe"].one_layer()
    compiled = moec.compile(family.build(), (), family.inputs(2, 7), kv_cache=False, verify=False)
    assert "decode" not in compiled.module
    with pytest.warns(UserWarning, match="cache: the model was compiled without a KV cache"):
        compiled.generate([[5]], max_new_tokens=1)
