"""Prompts that begin alike: what is known is counted, and changes no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moec
from tests.serving.running import (
    GREEDY,
    MODEL,
    TEXT,
    Running,
    continuation,
    process,
    serving,
)

LONG = "def area(width, height):\n    return width * height\n" * 6


def test_what_is_known_of_a_prompt(model: moec.LoadedModel) -> None:
    with serving(model, prefix_tokens=512) as running:
        count = len(model.tokenizer.encode(LONG))
        for reused in (0, (count - 32) // 32 * 32):
            answer = running.client.completions.create(prompt=LONG, max_tokens=9, **GREEDY)
            assert answer.choices[0].text == continuation(model, LONG, 9)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == count
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == reused
        assert running.metric("prefix_cache_queries_total") == 2 * count
        assert running.metric("prefix_cache_hits_total") == reused
        assert running.metric("prompt_tokens_total") == 2 * count - reused


def test_choices_read_their_prompt_once(model: moec.LoadedModel) -> None:
    with serving(model, prefix_tokens=512) as running:
        count = len(model.tokenizer.encode(LONG))
        options: dict[str, Any] = {"temperature": 1.3, "seed": 5}
        answer = running.client.completions.create(
            model=MODEL, prompt=LONG, n=3, max_tokens=9, **options
        )
        expected = model.generate([LONG] * 3, max_new_tokens=9, **options)
        assert [choice.text for choice in answer.choices] == [t[len(LONG) :] for t in expected]
        reused = (count - 32) // 32 * 32
        assert running.metric("prompt_tokens_total") == count + 2 * (count - reused)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("tokens", ["0", None])
def test_the_command_stores_prefixes_unless_told_not_to(path: Path, tokens: str | None) -> None:
    options = [] if tokens is None else ["--prefix-tokens", tokens]
    with process(path, "--threads", "1", *options) as (_, port):
        running = Running.__new__(Running)
        running.port = port
        for _ in range(2):
            answer = running.send("/v1/completions", TEXT | {"prompt": LONG})[1]
        details = answer["usage"]["prompt_tokens_details"]
        assert (details["cached_tokens"] > 0) == (tokens is None)
