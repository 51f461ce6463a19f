"""`echo` and `best_of` of /v1/completions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import moec
from moec.runtime.text.engine import Engine
from moec.runtime.text.request import Request
from tests.serving.running import GREEDY, PROMPT, TEXT, Running, continuation

LONG = "".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(16))


def complete(running: Running, **more: Any) -> Any:
    status, answer, _ = running.send("/v1/completions", TEXT | GREEDY | more)
    assert status == 200, answer
    return answer


def test_the_text_begins_with_its_prompt(shared: Running, model: moec.LoadedModel) -> None:
    expected = PROMPT + continuation(model, PROMPT, 8)
    answer = shared.client.completions.create(
        prompt=[PROMPT, LONG], max_tokens=8, echo=True, **GREEDY
    )
    texts = [choice.text for choice in answer.choices]
    assert texts == [expected, LONG + continuation(model, LONG, 8)]
    chunks = shared.lenient.completions.create(
        prompt=PROMPT, max_tokens=8, echo=True, stream=True, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    tokens = model.tokenizer.encode(PROMPT)
    assert (
        complete(shared, prompt=tokens, max_tokens=8, echo=True)["choices"][0]["text"] == expected
    )


def test_without_new_tokens(shared: Running) -> None:
    """As programs send it that score texts; the prompt is computed alone."""
    answer = complete(shared, prompt=LONG, max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (LONG, "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    body = TEXT | GREEDY | {"prompt": LONG, "max_tokens": 0, "echo": True, "logprobs": 0}
    chunks = [c.choices[0] for c in shared.lenient.completions.create(stream=True, **body)]
    assert "".join(chunk.text for chunk in chunks) == LONG
    (scores,) = (chunk.logprobs for chunk in chunks if chunk.logprobs and chunk.logprobs.tokens)
    assert scores.token_logprobs == choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_the_prompt_has_log_probabilities(
    shared: Running, model: moec.LoadedModel, prompt: str
) -> None:
    """Those of the logits of one call of the whole text: bf16 rounds logits up to 10 to 3e-2."""
    answer = complete(shared, prompt=prompt, max_tokens=6, echo=True, logprobs=3)
    (choice,) = answer["choices"]
    scores = choice["logprobs"]
    assert "".join(scores["tokens"]) == choice["text"]
    offsets = zip(scores["text_offset"], scores["tokens"], strict=True)
    assert [choice["text"][at:][: len(token)] for at, token in offsets] == scores["tokens"]
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    tokens = model.tokenizer.encode(choice["text"])
    (logits,) = [model(np.array([tokens]))]
    rows = np.asarray(logits)[0].astype(np.float64)
    shares = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    right = shares[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(scores["token_logprobs"][1:], right, atol=8e-2)
    for top, token, share in zip(
        scores["top_logprobs"][1:], scores["tokens"][1:], scores["token_logprobs"][1:], strict=True
    ):
        assert len(top) <= 3
        assert top.get(token, share) == share


def test_scores_of_a_prompt_change_nothing_else(model: moec.LoadedModel) -> None:
    """Neither the company of a text, nor what is known of its prompt, changes its scores."""
    prompt = model.tokenizer.encode(LONG)
    assert len(prompt) > 150
    plain, scored = Request(9, logprobs=1), Request(9, logprobs=1, scores_prompt=True)
    outcomes = []
    for company in (False, True):
        engine = Engine(model.executor, 3, 512, prefix_tokens=600 * company)
        others = [engine.submit(prompt, plain) for _ in range(2 * company)]
        text, last = engine.submit(prompt, scored), engine.submit(prompt, plain)
        while engine.busy:
            engine.step()
        assert len(text.prompt_logprobs) == len(prompt) - 1
        assert text.reused == 0
        outcomes.append(text.prompt_logprobs)
        for other in (*others, last):
            assert (other.tokens, other.logprobs) == (text.tokens, text.logprobs)
            assert other.prompt_logprobs == []
    assert outcomes[0] == outcomes[1]


def test_the_best_of_several(shared: Running) -> None:
    options = {"temperature": 1.2, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    every = complete(shared, n=5, logprobs=0, **options)["choices"]
    means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in every]
    order = np.argsort(means)[::-1]
    assert len({choice["text"] for choice in every}) == 5
    for n in (1, 2, 5):
        answer = complete(shared, n=n, best_of=5, **options)
        assert [c["text"] for c in answer["choices"]] == [every[i]["text"] for i in order[:n]]
        assert [c["index"] for c in answer["choices"]] == [*range(n)]
        assert {c["logprobs"] for c in answer["choices"]} == {None}
        assert answer["usage"]["completion_tokens"] == 60
    answer = complete(shared, prompt=[PROMPT, "import "], best_of=3, logprobs=1, **options)
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["text"] in [choice["text"] for choice in every[:3]]
    assert len(answer["choices"][1]["logprobs"]["tokens"]) == 12
    client = shared.client.completions.create(prompt=PROMPT, best_of=5, n=1, **GREEDY)
    assert len(client.choices) == 1
