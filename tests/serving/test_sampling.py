"""The fields that change which tokens come, and those that return their probabilities."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import moec
from moec.runtime.text.prompt import bytes_of
from moec.runtime.text.sampling import Sampling
from moec.serving.fields import read_fields
from tests.command_line import invoke
from tests.serving.running import CHAT, GREEDY, MODEL, PROMPT, TEXT, Running, continuation

OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"presence_penalty": 2.0, "frequency_penalty": 1.5},
    {"temperature": 1.5, "seed": 4, "min_p": 0.2},
    {"temperature": 1.5, "seed": 4, "typical_p": 0.4},
    {"logit_bias": {"70": 30.0, "5": -100}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_the_server_and_the_library_draw_the_same_tokens(
    shared: Running, model: moec.LoadedModel, options: dict[str, Any]
) -> None:
    body = GREEDY | options
    answer = shared.send("/v1/completions", body | {"prompt": PROMPT, "max_tokens": 30})[1]
    local = dict(options)
    if "logit_bias" in options:
        local["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
    text = continuation(model, PROMPT, 30, **local)
    assert answer["choices"][0]["text"] == text
    assert text != continuation(model, PROMPT, 30)


def test_no_stop_before_min_tokens(shared: Running, model: moec.LoadedModel) -> None:
    free = model.tokenizer.encode(continuation(model, PROMPT, 30), special=False)
    options = {"stop_token_ids": free[2:4], "max_tokens": 30}
    stopped = shared.send("/v1/completions", TEXT | GREEDY | options)[1]
    assert stopped["usage"]["completion_tokens"] == 3
    late = shared.send("/v1/completions", TEXT | GREEDY | options | {"min_tokens": 9})[1]
    assert late["usage"]["completion_tokens"] >= 9
    tokens = model.generate(
        [model.tokenizer.encode(PROMPT)], max_new_tokens=30, min_tokens=9, stop=free[2:4]
    )[0]
    assert len(tokens) - len(model.tokenizer.encode(PROMPT)) == late["usage"]["completion_tokens"]


def test_log_probabilities_of_a_chat(shared: Running, model: moec.LoadedModel) -> None:
    """They are those of the logits of a call of the whole text, whatever is sampled: bf16 rounds to
    3e-3, the logits are up to 10, so 5e-2 is generous, and the ten likeliest differ by .3."""
    options: dict[str, Any] = {"max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    options |= {"temperature": 1.2, "seed": 3, "model": MODEL, **CHAT}
    answer = shared.client.chat.completions.create(**options)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    entries = choice.logprobs.content
    written = b"".join(bytes(entry.bytes or ()) for entry in entries)
    assert written.decode(errors="replace") == choice.message.content
    chunks = [*shared.client.chat.completions.create(stream=True, **options)]
    streamed = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [entry for content in streamed for entry in content or ()] == entries
    (prompt,) = [shared.service.tokenizer.chat([{"role": "user", "content": "x"}])]
    tokens = prompt + model.tokenizer.encode(written.decode(), special=False)
    logits = model(np.array([tokens]))
    scores = np.asarray(next(iter(logits.values())) if isinstance(logits, dict) else logits)[0]
    for entry, row, token in zip(
        entries, scores[len(prompt) - 1 :], tokens[len(prompt) :], strict=False
    ):
        shares = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
        assert abs(entry.logprob - shares[token]) < 5e-2
        top = [item.logprob for item in entry.top_logprobs]
        assert np.allclose(top, np.sort(shares)[::-1][:3], atol=5e-2)


def test_log_probabilities_of_a_completion(shared: Running) -> None:
    body = TEXT | GREEDY | {"max_tokens": 10}
    answer = shared.client.completions.create(logprobs=2, **body)
    (choice,) = answer.choices
    scores = choice.logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.text_offset is not None
    assert scores.top_logprobs is not None
    assert scores.token_logprobs is not None
    assert "".join(scores.tokens) == choice.text
    assert [
        choice.text[at:][: len(t)] for at, t in zip(scores.text_offset, scores.tokens, strict=True)
    ] == scores.tokens
    for top, token, logprob in zip(
        scores.top_logprobs, scores.tokens, scores.token_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
    none = shared.client.completions.create(logprobs=0, **body).choices[0].logprobs
    assert none is not None
    assert none.top_logprobs == [{}] * 10
    assert none.token_logprobs == scores.token_logprobs
    assert shared.client.completions.create(**body).choices[0].logprobs is None


def test_stop_tokens_have_no_log_probability(shared: Running, model: moec.LoadedModel) -> None:
    free = model.tokenizer.encode(continuation(model, PROMPT, 30), special=False)
    body = TEXT | GREEDY | {"logprobs": 0, "stop_token_ids": [free[4]]}
    (choice,) = shared.send("/v1/completions", body)[1]["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == free.index(free[4])


def test_a_response_keeps_to_its_format(shared: Running, model: moec.LoadedModel) -> None:
    """tiny_moe has read no JSON; the regular expression lets it end."""
    answer_format: Any = {"type": "regex", "regex": "(yes|no), [a-z]{3} [0-9]{2}"}
    answer = shared.send("/v1/chat/completions", CHAT | GREEDY | {"response_format": answer_format})
    (choice,) = answer[1]["choices"]
    assert re.fullmatch(answer_format["regex"], choice["message"]["content"])
    assert choice["finish_reason"] == "stop"
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yz"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    json_schema: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    completion = shared.client.chat.completions.create(
        response_format=json_schema, n=2, seed=1, temperature=1.5, model=MODEL, **CHAT
    )
    for each in completion.choices:
        assert json.loads(each.message.content or "")["a"] in ("x", "yz")
    text = model.generate(PROMPT, response_format=answer_format)
    assert re.fullmatch(answer_format["regex"], text.removeprefix(PROMPT))


def tokenizer(tokens: list[str], decoder: Any) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(models.BPE({t: n for n, t in enumerate(tokens)}, []))
    built.decoder = decoder
    built.add_special_tokens(["<end>"])
    return built


def test_bytes_of_tokens() -> None:
    """Every byte of byte-level tokens; SentencePiece's spaces and bytes; added ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = tokenizer([*alphabet, "Ġde"], decoders.ByteLevel())
    of = bytes_of(by_byte)
    assert {of(token) for token in range(256)} == {bytes([n]) for n in range(256)}
    assert (of(256), of(257), of(999)) == (b" de", b"<end>", b"")
    pieces = tokenizer(
        ["▁de", "<0xE2>", "é", "<0xe2>"], decoders.Sequence([decoders.ByteFallback()])
    )
    assert [*map(bytes_of(pieces), range(5))] == [
        b" de",
        b"\xe2",
        "é".encode(),
        b"<0xe2>",
        b"<end>",
    ]


@pytest.mark.parametrize("least", [-np.inf, -2e4])
def test_a_token_without_probability_is_valid_json(least: float) -> None:
    from moec.runtime.text.sampling import Logprobs
    from moec.serving.answer import Score, of_chat, of_completion

    scores = [Score(1, Logprobs(least, ((1, least), (2, -0.5))), 0)]
    text = json.dumps([f(scores, lambda token: bytes([token])) for f in (of_chat, of_completion)])
    assert json.loads(text)[0]["content"][0]["logprob"] == -9999.0
    assert "Infinity" not in text


def test_what_a_request_does_not_say_is_the_models() -> None:
    body = {"prompt": "a", "seed": 1}
    model = Sampling(temperature=0.6, top_k=20, repetition_penalty=1.1)
    for fields, default, sampling in (
        ({}, Sampling(), Sampling(1.0, seed=1)),
        ({"temperature": None}, model, replace(model, seed=1)),
        ({"top_k": 0, "top_p": 0.5}, model, replace(model, top_k=None, top_p=0.5, seed=1)),
        ({"temperature": 0, "top_p": 0.5}, model, Sampling(repetition_penalty=1.1)),
    ):
        assert read_fields(body | fields, chat=False).sampling(default) == sampling


def test_commands_draw_as_the_model_says(
    compiled_tiny_moe: moec.CompiledModel, tmp_path: Path
) -> None:
    config = {"do_sample": True, "temperature": 1.5, "top_k": 9, "eos_token_id": 0}
    files = dict(compiled_tiny_moe.source.files)
    files["tokenizer/generation_config.json"] = json.dumps(config).encode()
    source = replace(compiled_tiny_moe.source, files=files)
    replace(compiled_tiny_moe, source=source).save(tmp_path / "m.moec")
    model = moec.load(tmp_path / "m.moec")
    sampled = model.generate("def ", max_new_tokens=9, temperature=1.5, top_k=9, seed=3)
    for words, says, text in (
        (["--seed", "3"], "temperature 1.5, top_k 9, seed 3; --temperature 0", sampled),
        (["--temperature", "0"], "", model.generate("def ", max_new_tokens=9)),
        (["--beams", "2"], "", model.generate("def ", max_new_tokens=9, num_beams=2)),
    ):
        prompt = ["run", str(tmp_path / "m.moec"), "--prompt", "def ", "--max-new-tokens", "9"]
        result = invoke(*prompt, *words)
        assert result.stdout == text.removeprefix("def ") + "\n"
        assert ("tokens are drawn with" in result.stderr) == bool(says)
        assert says in result.stderr
    chat = ["chat", str(tmp_path / "m.moec"), "--top-p", "0"]
    result = invoke(*chat)
    assert "top_p is 0.0; it must be above 0" in result.stderr
