"""`moec serve`: functions that a client offers, with OpenAI's official client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest

import moec
from moec.runtime.call.caches import Cache
from moec.runtime.call.executor import Executor
from moec.runtime.dtypes import Array
from moec.runtime.text.chats.chat import ChatTemplate
from tests.serving.running import CHAT, MODEL, Paced, Running, serving

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} write <tool_call>{% endif %}"
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}{{ m.tool_call_id }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}={{ c.function.arguments.x }}{% endfor %};"
    "{% endfor %}"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
STOCKS = {"type": "function", "function": {"name": "stocks"}}
MALFORMED = {"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}
OPTIONS: Any = {
    "model": MODEL, "messages": CHAT["messages"], "temperature": 1, "seed": 4, "max_tokens": 200,
}  # fmt: skip


class Scripted(Paced):
    """Its likeliest tokens are those of a script, after each prompt."""

    script: Sequence[int] = ()
    step = 0

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.account = None  # a token of the script for each call

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        logits = super().decode(counts, caches, requests, lengths)
        if self.script:
            self.step = 0 if lengths.max() > 1 else self.step + 1
            logits = np.zeros_like(logits)
            logits[..., self.script[self.step]] = 100
        return logits


@pytest.fixture
def running(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model, paced=Scripted) as running:
        tokenizer = replace(running.service.tokenizer, template=ChatTemplate(TEMPLATE))
        running.service.tokenizer = tokenizer
        yield running


@pytest.mark.parametrize("tools", [[WEATHER], [STOCKS, WEATHER]], ids=len)
def test_a_named_function_is_called(running: Running, tools: list[Any]) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    options = OPTIONS | {"tools": tools, "tool_choice": choice}
    answer = running.client.chat.completions.create(**options)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Oslo", "Rome")
    assert arguments["days"] <= 9
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == (
        "tool_calls", None,
    )  # fmt: skip
    chunks = list(running.client.chat.completions.create(stream=True, **options))
    (delta,) = [c.choices[0].delta for c in chunks if c.choices[0].delta.tool_calls]
    (streamed,) = delta.tool_calls or ()
    assert streamed.index == 0
    assert streamed.function is not None
    assert streamed.function.arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_some_function_is_called(running: Running) -> None:
    options = OPTIONS | {"tools": [WEATHER, STOCKS], "tool_choice": "required", "n": 6}
    answer = running.client.chat.completions.create(**options)
    calls = [call for c in answer.choices for call in c.message.tool_calls or ()]
    ended = [choice for choice in answer.choices if choice.finish_reason == "tool_calls"]
    assert len(calls) == len(ended) >= 4  # free arguments may have no end within 200 tokens
    assert {call.function.name for call in calls} <= {"weather", "stocks"}
    assert len({call.id for call in calls}) == len(calls)


CALL = '<tool_call>\n{"name": "stocks", "arguments": {"x": "é"}}\n</tool_call>'


@pytest.fixture
def scripted(running: Running) -> Scripted:
    assert isinstance(running.executor, Scripted)
    return running.executor


def test_calls_that_the_model_chooses(running: Running, scripted: Scripted) -> None:
    tokenizer = running.service.tokenizer
    scripted.script = [*tokenizer.encode(f"Let me see. {CALL}{CALL}"), *tokenizer.stop]
    options = OPTIONS | {"tools": [WEATHER, STOCKS], "temperature": 0}
    for parallel, count in ((True, 2), (False, 1)):
        options["parallel_tool_calls"] = parallel
        answer = running.client.chat.completions.create(**options)
        message = answer.choices[0].message
        assert message.content == "Let me see."
        assert answer.usage is not None  # a second call that is not wanted is not computed
        assert (answer.usage.completion_tokens == len(scripted.script)) == parallel
        calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
        assert calls == [("stocks", '{"x": "é"}')] * count
        assert answer.choices[0].finish_reason == "tool_calls"
        chunks = list(running.client.chat.completions.create(stream=True, **options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        deltas = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        assert text == "Let me see."
        assert [call.index for call in deltas] == list(range(count))


def test_tools_that_may_not_be_called_are_not_read(running: Running, scripted: Scripted) -> None:
    tokenizer = running.service.tokenizer
    scripted.script = [*tokenizer.encode(CALL), *tokenizer.stop]
    options = OPTIONS | {"tools": [STOCKS], "tool_choice": "none", "temperature": 0}
    answer = running.client.chat.completions.create(**options)
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"


def test_the_template_reads_tools_and_earlier_calls(running: Running) -> None:
    called = {"name": "stocks", "arguments": '{"x": 7}'}
    messages = [
        *CHAT["messages"],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": called}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "up "},
    ]
    tokens = running.send("/tokenize", {"messages": messages})[1]["tokens"]
    text = "# user: x;# assistant: stocks=7;# tool: up c1;"
    assert tokens == running.service.tokenizer.encode(text, special=False)
    options = OPTIONS | {"messages": messages, "tools": [STOCKS], "max_tokens": 3}
    answer = running.client.chat.completions.create(**options)
    tool = {"type": "function", "function": {"name": "stocks", "description": "", "parameters": {}}}
    tool["function"]["strict"] = False  # type: ignore[index]
    prompt = f"{json.dumps([tool])} write <tool_call>{text}"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(
        running.service.tokenizer.encode(prompt, special=False)
    )


def test_options_reach_the_template(running: Running) -> None:
    source = "{{ reasoning_effort }} {{ enable_thinking | tojson }} {{ messages[0].content }}"
    tokenizer = replace(running.service.tokenizer, template=ChatTemplate(source))
    running.service.tokenizer = tokenizer
    options = {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}
    for more, text in (
        (options, "high false x"),
        (
            {"chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": [1]}},
            "low [1] x",
        ),
    ):
        status, answer, *_ = running.send("/v1/chat/completions", CHAT | more)
        assert status == 200, answer
        expected = len(tokenizer.encode(text, special=False))
        assert answer["usage"]["prompt_tokens"] == expected
    for name in ("messages", "tools", "add_generation_prompt"):
        body = CHAT | {"chat_template_kwargs": {name: []}}
        status, answer, *_ = running.send("/v1/chat/completions", body)
        assert status == 400
        assert f"{name} is no option of a chat template" in answer["error"]["message"]
    status, answer, *_ = running.send("/v1/completions", {"prompt": "a", "reasoning_effort": "low"})
    assert (status, answer["error"]["param"]) == (400, "reasoning_effort")


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"tools": [STOCKS, STOCKS]}, "tools", "two functions have the same name"),
        (
            {"tools": [STOCKS], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "g is not among the tools",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "tools",
            "arguments are held to the schema where a call is required: leave strict out",
        ),
        (
            {"tools": [MALFORMED], "tool_choice": "required"},
            "tools",
            "response_format:",
        ),
        ({"tools": [STOCKS], "tool_choice": "always"}, "tool_choice", "invalid enum value"),
    ],
)
def test_refusals(running: Running, more: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        running.client.chat.completions.create(**(OPTIONS | more))
    assert refused.value.param == param
    assert words in str(refused.value)
