"""`/v1/embeddings`, with the official client."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moec
from moec.commands.serving.serve import NO_EMBEDDINGS
from moec.runtime.package import DECODE, HIDDEN, MAIN
from moec.runtime.text.embed import embed
from tests.commands.serving.running import MODEL, Running, serving

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
        vector = embed(embedding.executor, tokens, pooling)
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
    expected = np.array([embed(embedding.executor, text, "mean") for text in tokens])
    for request in (TEXTS, tokens):
        for more in ({}, {"encoding_format": "float"}, {"user": "me"}):
            np.testing.assert_array_equal(vectors(running, request, **more).astype("f4"), expected)
    for alone in (TEXTS[0], tokens[0]):
        np.testing.assert_array_equal(vectors(running, alone).astype("f4"), expected[:1])
    body = {"input": TEXTS, "encoding_format": "base64"}
    status, answer, _ = running.send("/v1/embeddings", body)
    assert status == 200
    packed = base64.b64decode(answer["data"][2]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(packed, "<f4"), expected[2])
    count = sum(map(len, tokens))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert running.service.used == 0


REFUSED = [
    ({"input": "x", "dimensions": 8}, "dimensions", "all dimensions of the model's hidden states"),
    ({"input": "x", "encoding_format": "int8"}, "encoding_format", "invalid enum value 'int8'"),
    ({"input": "x", "pooling": "max"}, "pooling", "not known, or not supported"),
    ({}, "", "object missing required field `input`"),
    ({"input": []}, "input", "it is missing or empty"),
    ({"input": ["x", [1]]}, "input", "give texts, or tokens, not both"),
    ({"input": [[]]}, "input", "the text has no tokens"),
    ({"input": [5, -1]}, "input", "-1"),
    ({"input": [[5], [1024]]}, "input", "1024"),
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
