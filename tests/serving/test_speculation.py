"""Guessed tokens through the doors: a server, `moec run` and `moec chat` write the same texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import invoke
from tests.serving.running import GREEDY, Running

LINE = "def f(x):\n    return f(x)\n"
BODY = GREEDY | {"prompt": LINE * 3, "max_tokens": 40, "logprobs": 2}


@pytest.mark.parametrize("more", [{}, {"stop": ["return"]}, {"temperature": 0.4, "seed": 3}])
def test_the_server_answers_the_same(shared: Running, more: dict[str, Any]) -> None:
    """With the log probability and the place of each token, streamed or not."""
    names = ("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")
    generated = "generation_tokens_total"
    before = [shared.metric(name) for name in names]
    streams = []
    for speculate in ("off", 7):
        shared.service.speculate = speculate
        count = shared.metric(generated)
        answer = shared.send("/v1/completions", BODY | more)[1]
        if not more.get("stop"):  # tokens after a string are not of the text
            assert shared.metric(generated) - count == answer["usage"]["completion_tokens"]
        chunks = shared.lenient.completions.create(stream=True, **(BODY | more))
        pieces = [chunk.choices[0].model_dump() for chunk in chunks]
        streams.append((answer["choices"], answer["usage"], pieces))
    shared.service.speculate = "auto"
    assert streams[0] == streams[1]
    guessed, accepted = (shared.metric(name) - old for name, old in zip(names, before, strict=True))
    assert guessed >= accepted >= 0
    assert guessed > 0


def run(path: Path, *words: str) -> Any:
    words = ("run", str(path), "--prompt", LINE * 3, "--max-new-tokens", "40", *words)
    return invoke(*words)


def test_run_says_what_was_guessed(path: Path) -> None:
    off, on = (json.loads(run(path, "--json", "--speculate", kind).stdout) for kind in ("off", "3"))
    assert on["tokens"] == off["tokens"]
    assert off["speculation"] == {"calls": 0, "guessed": 0, "accepted": 0}
    counts = on["speculation"]
    assert 3 * counts["calls"] >= counts["guessed"] >= counts["accepted"] > 0
    shown = run(path, "--speculate", "3")
    assert f", {counts['accepted']} of {counts['guessed']} guesses accepted\n" in shown.stderr
    assert "guesses" not in run(path, "--speculate", "off").stderr


@pytest.mark.parametrize("value", ["on", "8", "-1", "1.5"])
def test_values_that_are_refused(path: Path, value: str) -> None:
    result = run(path, "--speculate", value)
    assert result.exit_code == 2
    assert "it must be auto, off, or from 1 to 7" in result.stderr
