"""`moec serve`: the contract of OpenAI's interface, its official client, limits and signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from click.testing import CliRunner
from prometheus_client import generate_latest

import moec
from moec.__main__ import cli
from moec.commands.serving.app import MOST_BYTES, application
from moec.commands.serving.routing_watch import RoutingWatch
from moec.commands.serving.server import listen
from moec.commands.serving.service import Service
from moec.errors import ArtifactError
from moec.runtime.call.caches import Cache
from moec.runtime.call.executor import Executor
from moec.runtime.dtypes import Array
from moec.runtime.package import Package
from moec.runtime.text.chat import ChatTemplate
from moec.runtime.text.engine import Engine

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}def "
MODEL, PROMPT = "tiny", "def main("
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


class Paced:
    """An executor each of whose calls takes some seconds more, or fails."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.seconds = executor, 0.0
        self.fails: Exception | None = None

    @property
    def package(self) -> Package:
        return self.executor.package

    def number_requests(self, count: int) -> Array:
        return self.executor.number_requests(count)

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        return self.executor.new_caches(texts, room)

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        if self.fails:
            raise self.fails
        time.sleep(self.seconds)
        return self.executor.decode(counts, caches, requests, lengths)


@dataclass
class Running:
    """A server in a thread of the test, and what it serves."""

    service: Service
    executor: Paced
    port: int
    client: openai.OpenAI
    lenient: openai.OpenAI
    """For streams of completions: their chunks have `finish_reason` null until the last, from
    OpenAI too, and the client's type has no null."""

    def send(
        self, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """The status, the object, and the headers of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, content, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read()), dict(response.headers)

    def metric(self, name: str) -> float:
        text = generate_latest(self.service.metrics.registry).decode()
        (value,) = re.findall(rf'^moec:{name}{{model_name="tiny"}} (.*)$', text, re.MULTILINE)
        return float(value)


@pytest.fixture(scope="module")
def path(compiled_tiny_moe: moec.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / f"{MODEL}.moec"
    compiled_tiny_moe.save(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> moec.LoadedModel:
    return moec.load(path)


@contextlib.contextmanager
def serving(
    model: moec.LoadedModel,
    slots: int = 4,
    queue: int = 60,
    key: str | None = None,
    recorded: bool = False,
) -> Iterator[Running]:
    executor = Paced(model.executor)
    tokenizer = replace(model.tokenizer, template=ChatTemplate(TEMPLATE))
    engine = Engine(executor, slots, 512)
    routing = RoutingWatch(model.executor) if recorded else None
    service = Service(MODEL, "0123", engine, tokenizer, tokenizer.stop, queue, key, routing)
    config = uvicorn.Config(application(service), log_level="critical", lifespan="on")
    server = uvicorn.Server(config)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    port = listener.getsockname()[1]
    clients = [
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="none",
            max_retries=0,
            timeout=60,
            _strict_response_validation=checks,
        )
        for checks in (True, False)
    ]
    running = Running(service, executor, port, *clients)
    try:
        until(lambda: server.started)
        yield running
    finally:
        for client in clients:
            client.close()
        server.should_exit = True
        thread.join()
    assert routing is None or not routing.counting
    assert service.used == 0
    if not service.worker.error:
        assert not engine.busy
        assert engine.cached == 0


@pytest.fixture(scope="module")
def shared(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model) as running:
        yield running


def until(condition: Callable[[], Any], seconds: float = 20.0) -> float:
    """Waits for a condition; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "the condition did not come true"
        time.sleep(0.002)
    return time.monotonic() - start


def continuation(model: moec.LoadedModel, prompt: str, count: int, **options: Any) -> str:
    text: str = model.generate(prompt, max_new_tokens=count, **options)
    return text.removeprefix(prompt)


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


TEXT = {"prompt": PROMPT}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (TEXT | {"colour": 1}, "colour", "not known, or not supported"),
        (TEXT | {"logprobs": 2}, "logprobs", "not supported: leave it out"),
        (CHAT | {"logprobs": True}, "logprobs", "not supported"),
        (CHAT | {"top_logprobs": 3}, "top_logprobs", "not supported"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools", "not supported"),
        (CHAT | {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        (CHAT | {"audio": {}}, "audio", "not known, or not supported"),
        (CHAT | {"modalities": ["audio"]}, "modalities", "not supported"),
        (TEXT | {"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        (TEXT | {"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        (TEXT | {"best_of": 2}, "best_of", "not supported"),
        (TEXT | {"temperature": 2.5}, "temperature", "expected `float` <= 2.0"),
        (TEXT | {"temperature": "hot"}, "temperature", "expected `float`, got `str`"),
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
    status, answer, _ = shared.send("/v1/completions", b" " * (MOST_BYTES + 1))
    assert status == 413
    assert "send a shorter one" in answer["error"]["message"]
    status, answer, _ = shared.send("/detokenize", {"tokens": "x"})
    assert (status, answer["error"]["param"]) == (400, "tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        shared.client.completions.create(prompt="a", logprobs=1, model=MODEL)
    assert caught.value.param == "logprobs"


def test_a_key(model: moec.LoadedModel) -> None:
    with serving(model, key="ünlocked") as running:
        for headers in ({}, {"Authorization": "Bearer x"}):
            status, answer, _ = running.send("/v1/models", **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert running.send("/health")[0] == 200
        key = "Bearer ünlocked".encode().decode("latin-1")
        assert running.send("/v1/models", Authorization=key)[0] == 200


def test_without_a_template_a_chat_is_refused(model: moec.LoadedModel) -> None:
    with serving(model) as running:
        running.service.tokenizer = model.tokenizer
        status, answer, _ = running.send("/v1/chat/completions", CHAT)
        assert status == 400
        assert "send text to /v1/completions" in answer["error"]["message"]


def begin(running: Running, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request, and reads no answer yet."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    connection.sendall(head.encode() + content)
    return connection


def read_until(connection: socket.socket, words: bytes) -> bytes:
    content = b""
    while words not in content:
        content += connection.recv(4096)
    return content


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(model: moec.LoadedModel, stream: bool) -> None:
    with serving(model, slots=1) as running:
        running.executor.seconds = 0.05
        body = TEXT | {"max_tokens": 400, "stream": stream, "ignore_eos": True}
        connections = [begin(running, body) for _ in range(2)]
        until(lambda: running.metric("num_requests_running") == 1)
        until(lambda: running.metric("num_requests_waiting") == 1)
        if stream:
            read_until(connections[0], b"data: ")
        for connection in connections:
            connection.close()
        name = "num_requests_running"
        seconds = until(lambda: not running.service.used and not running.metric(name))
        assert seconds < 1  # of the 20 that the text would have taken
        text = generate_latest(running.service.metrics.registry).decode()
        assert 'finished_reason="abort",model_name="tiny"} 2.0' in text


def test_a_full_queue(model: moec.LoadedModel) -> None:
    with serving(model, slots=1, queue=2) as running:
        running.executor.seconds = 0.02
        body = TEXT | {"max_tokens": 200, "n": 3}
        with begin(running, body):
            until(lambda: running.metric("num_requests_waiting") == 2)
            status, answer, headers = running.send("/v1/completions", TEXT)
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            assert int(headers["retry-after"]) >= 1
            assert running.send("/ready")[0] == 503
            assert running.send("/health")[0] == 200
            with pytest.raises(openai.RateLimitError):
                running.client.completions.create(prompt="a", model=MODEL)
        until(lambda: not running.service.used)
        assert running.metric("admission_rejections_total") == 2
        assert running.send("/v1/completions", TEXT)[0] == 200


def test_an_engine_that_fails_says_so(model: moec.LoadedModel) -> None:
    with serving(model) as running:
        running.executor.seconds = 0.02
        body = TEXT | {"max_tokens": 400, "stream": True, "ignore_eos": True}
        with begin(running, body) as connection:
            read_until(connection, b"data: ")
            running.executor.fails = RuntimeError("the disk is gone\nand more")
            content = read_until(connection, b"\r\n0\r\n\r\n")
        assert b'"message":"the model failed: RuntimeError: the disk is gone"' in content
        assert b"[DONE]" not in content
        status, answer, _ = running.send("/v1/completions", TEXT)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert running.send("/health")[0] == 503


def test_a_read_that_fails_ends_the_texts_in_it_and_no_others(model: moec.LoadedModel) -> None:
    with serving(model) as running:
        body = TEXT | {"temperature": 0}
        right = running.send("/v1/completions", body)[1]["choices"]
        running.executor.fails = ArtifactError("expert 3 of layer 0 cannot be read")
        status, answer, _ = running.send("/v1/completions", body)
        assert status == 500
        assert "expert 3 of layer 0 cannot be read" in answer["error"]["message"]
        running.executor.fails = None
        assert running.send("/health")[0] == 200
        status, answer, _ = running.send("/v1/completions", body)
        assert (status, answer["choices"]) == (200, right)


@contextlib.contextmanager
def process(path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`moec serve` in a process, and its port."""
    command = [sys.executable, "-m", "moec", "serve", str(path), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            port = re.search(r"^tiny at http://127.0.0.1:(\d+)/v1$", line)
            assert port, line + child.stderr.read()
            yield child, int(port[1])
        finally:
            child.kill()


def collect(port: int, started: threading.Barrier, texts: int) -> str:
    """The events of one stream of some texts, long enough for a signal to come in between."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = TEXT | {"max_tokens": 1000, "n": texts, "stream": True, "ignore_eos": True}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        content = response.read(64)
        started.wait(30)
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
            content += response.read()
        return content.decode()


def test_a_signal_under_load_lets_texts_end(path: Path) -> None:
    with process(path, "--slots", "12", "--threads", "1") as (child, port):
        started = threading.Barrier(7)
        with ThreadPoolExecutor(6) as pool:
            streams = [pool.submit(collect, port, started, 2) for _ in range(6)]
            started.wait(30)
            child.send_signal(signal.SIGTERM)
            assert child.stderr is not None
            assert child.stderr.readline() == "shutting down: 12 texts under way have 30 s\n"
            running = Running.__new__(Running)
            running.port = port
            status, answer, headers = running.send("/v1/completions", TEXT)
            assert (status, headers["retry-after"]) == (503, "1")
            assert "shutting down" in answer["error"]["message"]
            texts = [stream.result() for stream in streams]
        assert child.wait(20) == 0
        assert child.stderr.read() == ""
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)


def test_a_drain_that_is_too_short_ends_texts_with_an_error(path: Path) -> None:
    with process(path, "--drain", "0", "--threads", "1") as (child, port):
        started = threading.Barrier(2)
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(collect, port, started, 16)
            started.wait(30)
            child.send_signal(signal.SIGTERM)
            text = stream.result()
        assert child.wait(20) == 0
    assert "the server is shutting down" in text.splitlines()[-2]
    assert "[DONE]" not in text


def test_a_second_signal_ends_the_process(path: Path) -> None:
    with process(path, "--threads", "1") as (child, port):
        started = threading.Barrier(2)
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(collect, port, started, 16)
            started.wait(30)
            child.send_signal(signal.SIGTERM)
            assert child.stderr is not None
            assert "shutting down: 16 texts" in child.stderr.readline()
            child.send_signal(signal.SIGTERM)
            assert child.wait(5) == 143
            assert "[DONE]" not in stream.result()


def test_mistakes_of_the_command_line(path: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        result = CliRunner().invoke(cli, ["serve", *map(str, words)])
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "no such file" in refused(tmp_path / "none.moec", "--port", 0)
    assert "the model takes at most 1024" in refused(path, "--port", 0, "--context", 2000)
    assert "--api-key is empty" in refused(path, "--api-key", "")
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert f"--host 127.0.0.1 --port {port}: " in refused(path, "--port", port)


def test_help_imports_no_server() -> None:
    code = (
        "import sys\nfrom moec.__main__ import cli\n"
        "try: cli(['serve', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'starlette', 'uvicorn', 'prometheus_client'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
