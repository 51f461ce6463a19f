"""`moec serve`: keys, limits, clients that leave, failures and signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client import generate_latest

import moec
from moec.errors import ArtifactError
from moec.serving.server import listen
from tests.command_line import invoke
from tests.serving.running import (
    CHAT,
    GREEDY,
    MODEL,
    ROOT,
    TEXT,
    Running,
    process,
    serving,
    until,
)


def test_without_a_template_a_chat_is_refused(model: moec.LoadedModel) -> None:
    with serving(model) as running:
        running.service.tokenizer = model.tokenizer
        status, answer, _ = running.send("/v1/chat/completions", CHAT)
        assert status == 400
        assert "send text to /v1/completions" in answer["error"]["message"]


def begin(running: Running, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request, and reads no answer yet."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
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
        connections = [begin(running, body)]
        until(lambda: running.metric("num_requests_running") == 1)
        connections.append(begin(running, body))  # two at once could come in either order
        until(lambda: running.metric("num_requests_waiting") == 1)
        if stream:
            read_until(connections[0], b"data: ")
        for connection in connections:
            connection.close()
        name = "num_requests_running"
        seconds = until(lambda: not running.service.used and not running.metric(name))
        assert seconds < 1  # of the 20 that the text would have taken
        ended = 'finished_reason="abort",model_name="tiny"} 2.0'
        until(lambda: ended in generate_latest(running.service.families.registry).decode())


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


def test_an_engine_that_fails_says_so_and_recovers(model: moec.LoadedModel) -> None:
    with serving(model) as running:
        right = running.send("/v1/completions", TEXT | GREEDY)[1]["choices"]
        running.executor.seconds = 0.02
        body = TEXT | {"max_tokens": 400, "stream": True, "ignore_eos": True}
        with begin(running, body) as connection:
            read_until(connection, b"data: ")
            running.executor.fails = RuntimeError("the disk is gone\nand more")
            content = read_until(connection, b"\r\n0\r\n\r\n")
        assert b"tokens: RuntimeError: the disk is gone" in content
        assert b"and more" not in content
        assert b"[DONE]" not in content
        assert running.send("/health")[0] == 200
        for _ in range(2):
            status, answer, _ = running.send("/v1/completions", TEXT)
            assert (status, answer["error"]["type"]) == (500, "server_error")
        status, answer, _ = running.send("/health")
        assert status == 503
        assert "tiny: the last 3 calls of the model failed: see the log" in answer["status"]
        running.executor.fails = None
        assert running.send("/v1/completions", TEXT | GREEDY)[1]["choices"] == right
        assert running.send("/health")[0] == 200
        text = generate_latest(running.service.families.registry).decode()
        assert 'moec:text_failures_total{error="RuntimeError",model_name="tiny"} 3.0' in text


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


def collect(port: int, started: threading.Barrier, texts: int) -> str:
    """The events of one stream of some texts, long enough for a signal to come in between."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = TEXT | {"max_tokens": 1000, "n": texts, "stream": True, "ignore_eos": True}
    with contextlib.closing(connection):
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), kind)
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


def test_a_signal_ends_a_server_whose_stderr_nobody_reads(path: Path) -> None:
    """As of `moec serve 2>&1 | head -1`: its farewell raised, and it ran on."""
    with process(path, "--threads", "1") as (child, port):
        running = Running.__new__(Running)
        running.port = port
        assert running.send("/health")[0] == 200
        assert child.stderr is not None
        child.stderr.close()
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0


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
    def refused(*words: object, code: int = 2) -> str:
        result = invoke("serve", *words)
        assert result.exit_code == code
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "no such file" in refused(tmp_path / "none.moec", "--port", 0, code=1)
    assert "the model takes at most 1024" in refused(path, "--port", 0, "--context", 2000)
    for key in ("", "key\n", " key", "k\x7fy"):
        assert "--api-key is empty, or has blanks" in refused(path, "--port", 0, "--api-key", key)
    for name in ("http://x", "x/y", "a b", ""):
        message = refused(path, "--port", 0, "--allowed-host", name)
        assert f"--allowed-host {name}: give a name or an address" in message
    for origin in ("x.example", "https://x.example/", "https://u@x.example", ""):
        message = refused(path, "--port", 0, "--allow-origin", origin)
        assert f"--allow-origin {origin}: give scheme, name and port" in message
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert f"--host 127.0.0.1 --port {port}: " in refused(path, "--port", port, code=1)


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
