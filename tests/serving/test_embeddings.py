"""`/v1/embeddings`, with the official client."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moec
from moec.runtime.package import DECODE, HIDDEN, MAIN
from moec.runtime.text.embed import embed
from moec.runtime.text.texts import PADDED, PIECE, ROWS
from moec.serving.serve import NO_EMBEDDINGS
from tests.serving.running import MODEL, Running, serving

TEXTS = ["def main():", "import os", "class Parser(Base):\n    pass"]


@pytest.fixture(scope="module")
def embedding(short_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> moec.LoadedModel:
    path = tmp_path_factory.mktemp("embeddings") / "tiny.moec"
    moec.compile(short_moe, embeddings=True, verify=False).save(path)
    return moec.load(path)


@pytest.fixture(scope="module")
def running(embedding: moec.LoadedModel) -> Iterator[Running]:
    with serving(embedding) as running:
        running.service.embed = partial(embed, embedding.executor, pooling="mean")
        yield running


def alone(model: moec.LoadedModel, tokens: list[int], pooling: Any = "mean") -> Any:
    ((_, vector),) = embed(model.executor, [tokens], pooling)
    return vector


def vectors(running: Running, request: Any, **more: Any) -> np.ndarray[Any, Any]:
    client = running.client if "encoding_format" in more else running.lenient
    answer = client.embeddings.create(input=request, model=MODEL, **more)
    assert [item.index for item in answer.data] == [*range(len(answer.data))]
    return np.array([item.embedding for item in answer.data])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_they_are_those_of_eager(
    embedding: moec.LoadedModel, short_moe: Path, pooling: Any
) -> None:
    """Both in bf16, whose 8 bits two layers round some 20 times: 1 % of a vector."""
    model = AutoModelForCausalLM.from_pretrained(short_moe)
    for text in TEXTS:
        tokens = embedding.tokenizer.encode(text)
        with torch.no_grad():
            (states,) = model.model(torch.tensor([tokens])).last_hidden_state.float()
        right = states.mean(0) if pooling == "mean" else states[-1]
        vector = alone(embedding, tokens, pooling)
        assert vector.dtype == np.float32
        assert abs(np.linalg.norm(vector) - 1) < 1e-6
        assert np.linalg.norm(vector - (right / right.norm()).numpy()) < 2e-2


def test_no_weights_are_added(embedding: moec.LoadedModel) -> None:
    functions = embedding.executor.package.functions
    names = {port.name for name in (MAIN, DECODE) for port in functions[name].params}
    assert {port.name for port in functions[HIDDEN].params} < names
    (output,) = functions[HIDDEN].outputs
    assert output.shape[2] == 128


def test_texts_tokens_and_both_formats(running: Running, embedding: moec.LoadedModel) -> None:
    """The client asks for base64 by default, which its own type of the answer has not."""
    tokens = [embedding.tokenizer.encode(text) for text in TEXTS]
    expected = np.array([alone(embedding, text) for text in tokens])
    for request in (TEXTS, tokens):
        for more in ({}, {"encoding_format": "float"}, {"user": "me"}):
            np.testing.assert_array_equal(vectors(running, request, **more).astype("f4"), expected)
    for text in (TEXTS[0], tokens[0]):
        np.testing.assert_array_equal(vectors(running, text).astype("f4"), expected[:1])
    body = {"input": TEXTS, "encoding_format": "base64"}
    status, answer, _ = running.send("/v1/embeddings", body)
    assert status == 200
    packed = base64.b64decode(answer["data"][2]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(packed, "<f4"), expected[2])
    count = sum(map(len, tokens))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert running.service.used == 0


class Counted:
    """An executor, and the tokens [B, S] of its calls."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.package = executor, executor.package
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: Any, function: str) -> Any:
        self.shapes.append(inputs["input_ids"].shape)
        return self.executor(inputs, function)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_batches_have_the_bits_of_each_text_alone(
    embedding: moec.LoadedModel, pooling: Any
) -> None:
    """Of few tokens, of which equal numbers are batched, and of many, with padding between."""
    draw = random.Random(0)
    sizes = [
        1,
        1,
        2,
        7,
        7,
        7,
        22,
        23,
        24,
        24,
        25,
        26,
        31,
        31,
        32,
        33,
        40,
        41,
        64,
        85,
        90,
        97,
        100,
        300,
        510,
        512,
    ]
    draw.shuffle(sizes)
    texts = [[draw.randrange(3, 1000) for _ in range(size)] for size in sizes]
    counted: Any = Counted(embedding.executor)
    result = dict(embed(counted, texts, pooling))
    assert sorted(result) == [*range(len(texts))]
    for index, text in enumerate(texts):
        np.testing.assert_array_equal(result[index], alone(embedding, text, pooling))
    assert sum(count for count, _ in counted.shapes) == len(texts)
    assert len(counted.shapes) < 20
    lengths = iter(sorted(sizes))
    for count, size in counted.shapes:
        least = min(next(lengths) for _ in range(count))
        assert size == least or (least >= ROWS and size <= PADDED * least)
    assert all(count == 1 or count * size <= PIECE for count, size in counted.shapes)


def test_a_model_without_a_cache_computes_one_text_at_a_time(embedding: moec.LoadedModel) -> None:
    """It may mix texts, or tokens with those after them."""
    counted: Any = Counted(embedding.executor)
    counted.package = replace(embedding.executor.package, generation=None)
    texts = [[5, 6, 7]] * 3
    result = dict(embed(counted, texts, "mean"))
    assert counted.shapes == [(1, 3)] * 3
    np.testing.assert_array_equal(result[2], alone(embedding, texts[0]))


def test_many_texts_are_in_the_order_of_the_request(
    running: Running, embedding: moec.LoadedModel
) -> None:
    tokens = [[n % 90 + 3] * (n * 7 % 40 + 1) for n in range(60)]
    expected = np.array([alone(embedding, text) for text in tokens])
    np.testing.assert_array_equal(vectors(running, tokens).astype("f4"), expected)


REFUSED = [
    ({"input": "x", "dimensions": 8}, "dimensions", "all dimensions of the model's hidden states"),
    ({"input": "x", "encoding_format": "int8"}, "encoding_format", "invalid enum value 'int8'"),
    ({"input": "x", "pooling": "max"}, "pooling", "not known, or not supported"),
    ({}, "", "object missing required field `input`"),
    ({"input": []}, "input", "it is missing or empty"),
    ({"input": ["x", [1]]}, "input", "give texts, or tokens, not both"),
    ({"input": [[5], []]}, "input", "text 1 has no tokens"),
    ({"input": ["x", ""]}, "input", "text 1: the prompt encodes to no tokens"),
    ({"input": [5, -1]}, "input", "text 0 has the token -1; the model's are 0 to 1023"),
    ({"input": [[5], [6], [1024]]}, "input", "text 2 has the token 1024; the model's are 0 to"),
    ({"input": [[5], [2**70]]}, "input", "text 1 has the token 1180591620717411303424"),
    ({"input": [[5]] * 2049}, "input", "2049 texts: a request has at most 2048"),
    ({"input": [5] * 513}, "input", "text 0 has 513 tokens, and a text has at most 512"),
    ({"input": [True]}, "input[0]", "expected `int | str | array`"),
]


@pytest.mark.parametrize(("body", "name", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_fields_that_are_refused(
    running: Running, body: dict[str, Any], name: str, words: str
) -> None:
    status, answer, _ = running.send("/v1/embeddings", body)
    assert status == 400
    assert (answer["error"]["param"] or "") == name
    assert words in answer["error"]["message"], json.dumps(answer)
    assert running.service.used == 0


def test_models_without_them(shared: Running, short_moe: Path) -> None:
    shared.service.no_embeddings = NO_EMBEDDINGS
    status, answer, _ = shared.send("/v1/embeddings", {"input": "x"})
    assert status == 400
    assert "embeddings need moec compile --embeddings" in answer["error"]["message"]
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(moec.errors.UsageError, match="gives no embeddings: the model returns no"):
        moec.compile(layer, (torch.zeros(2, 4),), embeddings=True)
