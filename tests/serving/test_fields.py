"""`moec serve`: the contract of OpenAI's interface, with its official client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import moec
from moec.serving.server import Limits
from tests.serving.running import CHAT, GREEDY, MODEL, PROMPT, TEXT, Running, continuation


def test_a_completion(shared: Running, model: moec.LoadedModel) -> None:
    answer = shared.client.completions.create(prompt=PROMPT, max_tokens=20, **GREEDY)
    (choice,) = answer.choices
    assert choice.text == continuation(model, PROMPT, 20)
    assert choice.finish_reason == "length"
    assert answer.model == MODEL
    assert answer.system_fingerprint == "0123"
    count = len(model.tokenizer.encode(PROMPT))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (count, 20)
    assert answer.usage.total_tokens == count + 20
    short = shared.client.completions.create(prompt=PROMPT, **GREEDY)
    assert short.usage is not None
    assert short.usage.completion_tokens == 16


def test_a_streamed_completion(shared: Running, model: moec.LoadedModel) -> None:
    stream = shared.lenient.completions.create(
        prompt=PROMPT, max_tokens=20, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == continuation(model, PROMPT, 20)
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "length"]
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert len({(c.id, c.created) for c in chunks}) == 1


def test_several_prompts_as_texts_and_tokens(shared: Running, model: moec.LoadedModel) -> None:
    prompts = [PROMPT, "import "]
    tokens = [model.tokenizer.encode(prompt) for prompt in prompts]
    for sent in (prompts, tokens):
        answer = shared.client.completions.create(prompt=sent, max_tokens=9, **GREEDY)  # type: ignore[arg-type]
        texts = [choice.text for choice in answer.choices]
        assert texts == [continuation(model, prompt, 9) for prompt in prompts]


def test_a_chat(shared: Running, model: moec.LoadedModel) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Open a file"}]},
    ]
    prompt = "# system: Be brief.\n# user: Open a file\ndef "
    expected = continuation(model, prompt, 24)
    options: dict[str, Any] = {"messages": messages, "max_completion_tokens": 24, **GREEDY}
    answer = shared.client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    chunks = list(shared.client.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(c.object == "chat.completion.chunk" for c in chunks)
    free = shared.client.chat.completions.create(messages=messages, seed=1, model=MODEL)
    assert free.usage is not None
    assert free.choices[0].finish_reason == "stop" or free.usage.total_tokens == 512


def test_choices_and_seeds(shared: Running, model: moec.LoadedModel) -> None:
    """Choice i of a seed is text i of a batch with that seed, streamed or not."""
    options: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "seed": 5}
    expected = model.generate([PROMPT] * 3, max_new_tokens=12, **options)
    expected = [text.removeprefix(PROMPT) for text in expected]
    assert len(set(expected)) > 1
    sent: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "n": 3, "max_tokens": 12, **options}
    answer = shared.client.completions.create(**sent)
    assert [choice.text for choice in answer.choices] == expected
    texts = [""] * 3
    for chunk in shared.lenient.completions.create(stream=True, **sent):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    limited = shared.client.completions.create(extra_body={"top_k": 1}, **(sent | {"n": 1}))
    assert limited.choices[0].text == continuation(model, PROMPT, 12)


def test_stops(shared: Running, model: moec.LoadedModel) -> None:
    free = continuation(model, PROMPT, 30)
    stop = free[8:11]
    answer = shared.client.completions.create(prompt=PROMPT, max_tokens=30, stop=stop, **GREEDY)
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = shared.lenient.completions.create(
        prompt=PROMPT, max_tokens=30, stop=["\0", stop], stream=True, **GREEDY
    )
    assert "".join(c.choices[0].text for c in stream) == free[: free.index(stop)]
    token = model.tokenizer.encode(PROMPT + free)[6]
    tokens = shared.client.completions.create(
        prompt=PROMPT, max_tokens=30, extra_body={"stop_token_ids": [token]}, **GREEDY
    )
    assert tokens.choices[0].finish_reason == "stop"
    assert free.startswith(tokens.choices[0].text)


def test_a_text_does_not_depend_on_its_company(shared: Running, model: moec.LoadedModel) -> None:
    prompts = [f"def f{n}({'x, ' * (3 * n)}" for n in range(16)]
    alone = [continuation(model, prompt, 40) for prompt in prompts]

    def ask(prompt: str) -> str:
        answer = shared.client.completions.create(prompt=prompt, max_tokens=40, **GREEDY)
        return answer.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, prompts)) == alone


def test_models_tokens_and_health(shared: Running) -> None:
    assert [m.id for m in shared.client.models.list()] == [MODEL]
    assert shared.client.models.retrieve(MODEL).owned_by == "moec"
    tokens = shared.send("/tokenize", {"prompt": PROMPT})[1]["tokens"]
    assert shared.send("/detokenize", {"tokens": tokens})[1] == {"prompt": PROMPT}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert shared.send("/tokenize", chat)[1]["count"] > 4
    assert shared.send("/health")[:2] == (200, {"status": "ok"})
    assert shared.send("/ready")[:2] == (200, {"ready": True})
    before = shared.metric("generation_tokens_total")
    shared.client.completions.create(prompt=PROMPT, max_tokens=7, **GREEDY)
    assert shared.metric("generation_tokens_total") == before + 7


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (TEXT | {"colour": 1}, "colour", "not known, or not supported"),
        (CHAT | {"echo": True}, "echo", "not supported: leave it out"),
        (CHAT | {"max_tokens": 0}, "max_tokens", "expected `int` >= 1, or echo: true"),
        (TEXT | {"logprobs": True}, "logprobs", "expected `int`: the number of likeliest"),
        (TEXT | {"logprobs": 21}, "logprobs", "expected `int` <= 20"),
        (TEXT | {"top_logprobs": 2}, "top_logprobs", "it needs a chat, and logprobs: true"),
        (CHAT | {"logprobs": 3}, "logprobs", "expected `bool`: top_logprobs is their number"),
        (CHAT | {"top_logprobs": 3}, "top_logprobs", "it needs a chat, and logprobs: true"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "expected `int` <= 20"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools[0]", "missing required field `function`"),
        (CHAT | {"tools": [TOOL]}, "tools", "chat template has no calls of functions in JSON"),
        (TEXT | {"tools": [TOOL]}, "tools", "not known, or not supported"),
        (
            CHAT | {"tools": [TOOL], "response_format": {"type": "json_object"}},
            "response_format",
            "it cannot be combined with tools",
        ),
        (CHAT | {"response_format": {"type": "xml"}}, "response_format", "has the type 'xml'"),
        (CHAT | {"response_format": "json"}, "response_format", "expected `object`, got `str`"),
        (CHAT | {"audio": {}}, "audio", "not known, or not supported"),
        (CHAT | {"modalities": ["audio"]}, "modalities", "not supported"),
        (TEXT | {"logit_bias": {"x": 1}}, "logit_bias", "its keys are token ids"),
        (TEXT | {"logit_bias": {"5": 101}}, "logit_bias[...]", "expected `float` <= 100.0"),
        (TEXT | {"logit_bias": {"1024": 1}}, "logit_bias", "token 1024 is not one of the model's"),
        (TEXT | {"frequency_penalty": 2.5}, "frequency_penalty", "expected `float` <= 2.0"),
        (TEXT | {"presence_penalty": -3}, "presence_penalty", "expected `float` >= -2.0"),
        (TEXT | {"repetition_penalty": 0}, "repetition_penalty", "expected `float` > 0"),
        (TEXT | {"min_p": 1.5}, "min_p", "expected `float` <= 1.0"),
        (TEXT | {"min_tokens": 17}, "min_tokens", "it is 17, and at most 16 may come"),
        (CHAT | {"best_of": 2}, "best_of", "not supported"),
        (TEXT | {"best_of": 2, "n": 3}, "best_of", "it must be at least n, 3"),
        (TEXT | {"best_of": 2, "stream": True}, "best_of", "is not for streams"),
        (TEXT | {"temperature": 2.5}, "temperature", "expected `float` <= 2.0"),
        (TEXT | {"temperature": "hot"}, "temperature", "expected `float | null`, got `str`"),
        (TEXT | {"top_p": 0}, "top_p", "expected `float` > 0"),
        (TEXT | {"top_k": -2}, "top_k", "expected `int` >= -1"),
        (TEXT | {"n": 0}, "n", "expected `int` >= 1"),
        (TEXT | {"n": 100}, "n", "at most 64 run or wait"),
        (TEXT | {"seed": -1}, "seed", "expected `int` >= 0"),
        (TEXT | {"max_tokens": True}, "max_tokens", "got `bool`"),
        (TEXT | {"max_tokens": 600}, "max_tokens", "a text has at most 512"),
        (TEXT | {"stop": ["a"] * 5}, "stop", "of length <= 4"),
        (TEXT | {"stop": [""]}, "stop[0]", "of length >= 1"),
        (TEXT | {"stream": 1}, "stream", "expected `bool`"),
        (TEXT | {"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"prompt": [""]}, "prompt", "no tokens"),
        ({"prompt": []}, "prompt", "missing or empty"),
        ({"prompt": [1, "a"]}, "prompt", "texts, or tokens, not both"),
        ({"prompt": [5000]}, "prompt", "token 5000 is not one of the model's 1024"),
        ({"prompt": [5] * 512}, "prompt", "has 512 tokens"),
        ({}, "prompt", "missing or empty"),
        ({"messages": []}, "messages", "missing or empty"),
        ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role", "invalid enum value"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "missing required field `content`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "invalid enum value",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "name": "Bo"}]},
            "messages[0].name",
            "not known, or not supported",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            "messages[0].tool_call_id",
            "a message of the user has none",
        ),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_calls": [CALL]}]},
            "messages[0].tool_calls",
            "a message of the tool has none",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
            "messages[0].tool_calls[0].function.arguments",
            "it is not the JSON text of an object",
        ),
        (CHAT | {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "leave one out"),
    ],
)
def test_fields_that_are_refused(
    shared: Running, body: dict[str, Any], param: str, words: str
) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, answer, _ = shared.send(path, body)
    assert status == 400
    error = answer["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert "\n" not in error["message"]


def test_fields_that_change_nothing(shared: Running) -> None:
    ignored = {"user": "x", "metadata": {"a": "b"}, "store": True, "prompt_cache_key": "k"}
    neutral = {"frequency_penalty": 0, "logit_bias": {}, "logprobs": None, "min_p": 0.0}
    body = TEXT | ignored | neutral | {"temperature": 0, "top_p": 0.5, "max_tokens": 2}
    assert shared.send("/v1/completions", body)[0] == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is no JSON"),
        (b"[]", "the body is no JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b'{"prompt": "\xff"}', "the body is no JSON"),
        (b'{"prompt": "\\ud800"}', "the body is no JSON"),
    ],
)
def test_bodies_that_are_refused(shared: Running, body: bytes, words: str) -> None:
    status, answer, _ = shared.send("/v1/completions", body)
    assert status == 400
    assert words in answer["error"]["message"]


def test_statuses(shared: Running) -> None:
    status, answer, _ = shared.send("/v1/completions", TEXT | {"model": "other"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert shared.send("/v1/models/other")[0] == 404
    status, answer, _ = shared.send("/v2")
    assert (status, answer["error"]["message"]) == (404, "GET /v2: not found")
    assert shared.send("/v1/completions")[0] == 405
    status, answer, _ = shared.send("/v1/completions", b" " * (Limits.body_bytes + 1))
    assert status == 413
    assert "send a shorter one" in answer["error"]["message"]
    status, answer, _ = shared.send("/detokenize", {"tokens": "x"})
    assert (status, answer["error"]["param"]) == (400, "tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        shared.client.completions.create(prompt="a", suffix="b", model=MODEL)
    assert caught.value.param == "suffix"
