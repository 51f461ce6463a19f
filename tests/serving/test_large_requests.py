"""What grows with a request is counted before it is computed, bounded, and holds up nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import moec
from moec.runtime.text.prompt import LONG
from moec.runtime.text.write_text import StopCut
from moec.serving import answer, app
from moec.serving.errors import ApiError
from moec.serving.service import Service, WorkPool
from tests.serving.running import CHAT, GREEDY, TEXT, Running, serving

PLACES: list[tuple[Any, str, str, Any]] = [
    (Service, "tokens", "/v1/completions", TEXT),
    (Service, "guide", "/v1/chat/completions", CHAT | {"max_tokens": 2}),
    (answer, "new_texts", "/v1/completions", TEXT | {"stop": "x"}),
    (answer.Choice, "add", "/v1/completions", TEXT | {"echo": True, "max_tokens": 1}),
    (answer, "of_completion", "/v1/completions", TEXT | {"logprobs": 1}),
    (app, "json_body", "/v1/completions", TEXT),
    (app, "read_fields", "/v1/completions", TEXT),
    (Service, "encode", "/tokenize", TEXT),
]


@pytest.mark.parametrize(("owner", "name", "route", "body"), PLACES, ids=[p[1] for p in PLACES])
def test_what_grows_with_a_request_leaves_the_event_loop_free(
    shared: Running, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, route: str, body: Any
) -> None:
    before, begun, go_on = getattr(owner, name), threading.Event(), threading.Event()

    def wait(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return before(*arguments, **options)

    monkeypatch.setattr(owner, name, wait)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(shared.send, route, body)
        try:
            assert begun.wait(30)
            assert shared.send("/health")[0] == 200
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result()[0] == 200


def test_texts_are_counted_before_their_prompts_are_read(
    shared: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("it was read")

    monkeypatch.setattr(Service, "tokens", refuse)
    for fields in ({"prompt": ["a"] * 20_000, "n": 128}, {"prompt": ["a"] * 65}, {"best_of": 65}):
        status, content, _ = shared.send("/v1/completions", TEXT | fields)
        assert status == 400
        assert "at most 64 run or wait here" in content["error"]["message"]
    assert shared.service.used == 0


def test_a_request_that_fails_to_be_read_gives_its_place_back(
    shared: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (ValueError("x"), MemoryError(), KeyboardInterrupt()):

        def fail(*_: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(Service, "tokens", fail)
        assert shared.send("/v1/completions", TEXT)[0] == 500
        assert shared.service.used == 0
    monkeypatch.undo()
    assert shared.send("/v1/completions", TEXT | GREEDY)[0] == 200


def test_the_pool_is_bounded_and_has_a_time_limit() -> None:
    async def main() -> None:
        go_on = threading.Event()
        pool = WorkPool(waiting=2, seconds=0.05)
        with pytest.raises(ApiError, match="reading the request takes more than") as caught:
            await pool.run(go_on.wait)
        assert caught.value.status == 503
        slow = asyncio.ensure_future(pool.run(go_on.wait))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too many requests are being read") as caught:
            await pool.run(int)
        assert caught.value.status == 503
        go_on.set()
        await slow
        assert await WorkPool().run(int, "3") == 3

    asyncio.run(main())


def test_a_request_whose_reading_takes_too_long(
    model: moec.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Service, "tokens", lambda *_: go_on.wait(30))
    with serving(model, pool_seconds=0.2) as running:
        status, content, headers = running.send("/v1/completions", TEXT)
        go_on.set()
        assert (status, headers["retry-after"]) == (503, "1")
        assert "reading the request takes more than 0.2 s" in content["error"]["message"]


def test_tokens_of_a_text_are_bounded_by_the_context(shared: Running) -> None:
    room = shared.service.engine.room
    assert shared.send("/tokenize", {"prompt": "x y" * 90})[0] == 200
    for fields, words in (
        ({"prompt": "x y " * room}, f"tokens, and a text has at most {room}"),
        ({"prompt": "x" * 7_000_000}, f"the text has 7000000 characters, and for {room} tokens"),
        ({"messages": [{"role": "user", "content": "x y " * room}]}, f"has at most {room}"),
    ):
        status, content, _ = shared.send("/tokenize", fields)
        assert status == 400
        assert words in content["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"prompt": [' + b"1," * 1_000_000 + b"1]}", 413, "more than 1000000 values"),
        (b'{"user": ' + b"[" * 200 + b"]" * 200 + b"}", 400, "nested more than 100 deep"),
        (b'{"user": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}", 400, "nested more than 100"),
        (b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "the body is no JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body is no JSON: Integer value out of range"),
    ],
    ids=["values", "lists", "objects", "recursion", "digits"],
)
def test_bodies_that_are_refused(shared: Running, body: bytes, status: int, words: str) -> None:
    answered, content, _ = shared.send("/v1/completions", body)
    assert answered == status
    assert words in content["error"]["message"]


def test_strings_that_end_a_text_take_linear_time() -> None:
    """Four of 200,000 characters took 22 s for some of text."""
    stops = tuple("ab" * 100_000 + end for end in "cdef")
    start, cut = time.process_time(), StopCut(stops)
    shown = "".join(cut.feed("abab") for _ in range(20_000)) + cut.flush()
    assert time.process_time() - start < 10
    assert shown == "abab" * 20_000
    cut = StopCut(stops)
    assert cut.feed("xy" + stops[1] + "z") == "xy"
    assert cut.ended


def test_long_texts_have_the_tokens_of_short_ones(model: moec.LoadedModel) -> None:
    """Long ones are encoded and decoded by functions that let other threads run."""
    text = "def main(x):\n    return x + 1é☃\n" * (LONG // 20)
    tokens = model.tokenizer.encode(text)
    assert len(text) > LONG < 4 * len(tokens)
    assert tokens == model.tokenizer.tokenizer.encode(text).ids
    assert model.tokenizer.decode(tokens) == model.tokenizer.tokenizer.decode(tokens) == text
