"""Requests that ended the engine's thread, and errors of any class where a text is written: each
ends its own request, and the other texts are as before."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client import generate_latest

import moec
from moec.errors import InputError
from moec.runtime.text.sampler import Sampler
from moec.serving.answer import Choice
from moec.serving.service import Service
from tests.serving.running import CHAT, GREEDY, PROMPT, TEXT, Running, serving


@pytest.fixture(scope="module")
def running(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model) as running:
        yield running


@pytest.fixture(scope="module")
def right(running: Running) -> Any:
    return running.send("/v1/completions", TEXT | GREEDY)[1]["choices"]


EVERY = 1024  # tokens of the model
FORBIDDEN = {str(token): -100 for token in range(EVERY)}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"min_tokens": 1, "stop_token_ids": [99999999]}, "stop_token_ids", "token 99999999 is not"),
    ({"min_tokens": 1, "stop_token_ids": [-1]}, "stop_token_ids", "token -1 is not one of the"),
    ({"min_tokens": 1, "stop_token_ids": [5, 2**70]}, "stop_token_ids", f"token {2**70} is not"),
    ({"stop_token_ids": [*range(EVERY)]}, "stop_token_ids", "length <= 1000"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "its keys are token ids"),
    ({"logit_bias": {"9" * 18: 1}}, "logit_bias", "is not one of the model's 1024 tokens"),
    ({"logit_bias": {"5\n": 1}}, "logit_bias", "its keys are token ids"),
    ({"seed": 2**63}, "seed", "expected `int` <= 9223372036854775807"),
    ({"stop": ["x" * 1001]}, "stop[0]", "length <= 1000"),
    ({"response_format": {"type": "regex", "regex": r"[^\s\S]"}}, "response_format", "no text of"),
    ({"response_format": {"type": "regex", "regex": r"a[^\s\S]b"}}, "response_format", "no text"),
    ({"response_format": {"type": "regex", "regex": "("}}, "response_format", "regex"),
    *(
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}, *rest)
        for schema, *rest in [
            ({"$ref": "#"}, "response_format", "no text of the model's tokens keeps to it"),
            ({"enum": []}, "response_format", "Unsatisfiable"),
            ({"type": "integer", "minimum": 5, "maximum": 3}, "response_format", "Unsatisfiable"),
        ]
    ),
    ({"a\nb": 1}, "a\nb", "this field is not known"),
    ({"x" * 9000: 1}, "x" * 500 + "…", "xxx…"),
    ({"prompt": ["a"] * 20_000, "n": 128}, "n", "2560000 texts, and at most 64 run or wait here"),
    ({"prompt": "a" * 600_000}, "prompt", "the text has 600000 characters, and for 512 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=lambda value: repr(value)[:40])
def test_fields_that_ended_the_server_are_refused(
    running: Running, right: Any, fields: dict[str, Any], param: str, words: str
) -> None:
    status, answer, _ = running.send("/v1/completions", {"prompt": "a", "max_tokens": 2} | fields)
    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert words in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 1200
    assert running.send("/v1/completions", TEXT | GREEDY)[1]["choices"] == right
    assert running.send("/health")[0] == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e-320, "min_p": 0.5},
        {"repetition_penalty": 1e308, "typical_p": 0.5, "presence_penalty": 2},
        {"temperature": 5e-324, "top_p": 5e-324},
        {"logit_bias": FORBIDDEN, "min_p": 1},
        {"min_p": 1e-320, "temperature": 2, "top_k": 2**70},
        {"logit_bias": FORBIDDEN, "temperature": 0, "min_tokens": 2, "max_tokens": 2},
        {"logit_bias": {"5": 1, "05": 1}},
    ],
    ids=repr,
)
def test_extreme_values_draw_tokens(running: Running, right: Any, fields: dict[str, Any]) -> None:
    body = {"prompt": "a", "max_tokens": 2, "logprobs": 2} | fields
    status, answer, _ = running.send("/v1/completions", body)
    assert status == 200, answer
    assert running.send("/v1/completions", TEXT | GREEDY)[1]["choices"] == right


def test_a_grammar_that_leaves_no_token_is_the_requests_error(running: Running) -> None:
    body = {"prompt": "a", "min_tokens": 3, "max_tokens": 9}
    body |= {"response_format": {"type": "regex", "regex": "a"}, "stop_token_ids": [*range(900)]}
    status, answer, _ = running.send("/v1/completions", body)
    assert status == 400
    assert "no token fits response_format here" in answer["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [{"name": "a\n"}, {"name": "a", "parameters": {"const": 2**70}}],
    ids=repr,
)
def test_names_of_functions_have_no_line_breaks(running: Running, fields: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": fields}]
    status, answer, _ = running.send("/v1/chat/completions", CHAT | {"tools": tools})
    assert status == 400
    assert answer["error"]["param"].startswith("tools")


class PanicException(BaseException):
    """As a library written in Rust raises it."""


PLANTS: list[tuple[Any, str]] = [
    (Sampler, "draw"),
    (Choice, "add"),  # the detokenizer, and what looks for strings that end a text
    (Service, "tokens"),
]


@pytest.mark.parametrize(("owner", "name"), PLANTS, ids=[name for _, name in PLANTS])
@pytest.mark.parametrize(
    "error", [ValueError("x\ny"), MemoryError(), PanicException("x"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_raised_ends_its_request_alone(
    running: Running,
    right: Any,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: BaseException,
    stream: bool,
) -> None:
    """Only in texts with the seed 77; the others are computed beside it."""
    before = getattr(owner, name)

    def plant(self: Any, *arguments: Any) -> Any:
        seed = arguments[0].seed if owner is Service else 0
        if owner is Sampler:
            seed = self._sampling.seed
        elif owner is Choice:
            seed = self.ticket.request.sampling.seed
        if seed == 77:
            raise error
        return before(self, *arguments)

    monkeypatch.setattr(owner, name, plant)
    bad = TEXT | {"seed": 77, "max_tokens": 5, "stream": stream}
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(running.send, "/v1/completions", TEXT | GREEDY) for _ in range(3)]
        connection = running.post("/v1/completions", bad)
        answers = [other.result()[1]["choices"] for other in others]
    status, content = connection
    assert type(error).__name__ in content or "bug in moec" in content
    assert status == (200 if stream and owner is not Service else 500)
    assert "[DONE]" not in content
    assert answers == [right] * 3
    assert running.send("/v1/completions", TEXT | GREEDY)[1]["choices"] == right
    assert running.send("/health")[0] == 200
    if owner is not Service:
        text = generate_latest(running.service.families.registry).decode()
        assert (
            f'moec:text_failures_total{{error="{type(error).__name__}",model_name="tiny"}}' in text
        )


def test_generate_refuses_what_the_server_refuses(model: moec.LoadedModel) -> None:
    for token in (99999999, -1, 2**70, 1024):
        with pytest.raises(InputError, match=f"token {token} is not one of the model's 1024"):
            model.generate(PROMPT, max_new_tokens=2, min_tokens=1, stop=[token])
        with pytest.raises(InputError, match=f"token {token} is not one of the model's 1024"):
            model.generate(PROMPT, max_new_tokens=2, logit_bias={token: 1.0})
    with pytest.raises(InputError, match="each of the 1024 tokens ends a text"):
        model.generate(PROMPT, max_new_tokens=2, min_tokens=1, stop=[*range(EVERY)])
    for options in ({"repetition_penalty": 1e-320}, {"presence_penalty": 1e308}, {"min_p": 1e-320}):
        options |= {"temperature": 1.0, "frequency_penalty": -1e308}
        assert model.generate(PROMPT, max_new_tokens=4, **options).startswith(PROMPT)
