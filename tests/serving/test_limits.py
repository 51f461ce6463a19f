"""Limits of what clients of `moec serve` send: heads, bodies, connections, and their times."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import moec
from moec.serving.server import Limits
from tests.serving.running import TEXT, Running, exchange, received, serving, until

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + "Transfer-Encoding: chunked\r\n\r\n"
BODY = json.dumps(TEXT | {"max_tokens": 1})
QUICK = Limits(
    head_seconds=0.6, body_seconds=0.6, linger_seconds=0.4, unread_seconds=0.6, slowest=10**9,
    body_bytes=300_000, all_bodies=1_000_000,
)  # fmt: skip


@pytest.fixture(scope="module")
def quick(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model, limits=QUICK) as running:
        yield running


def message(answer: tuple[int, dict[str, str], bytes]) -> str:
    return str(json.loads(answer[2])["error"]["message"])


@contextlib.contextmanager
def connected(port: int, request: str = "") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request.encode())
        yield connection


def sent(connection: socket.socket, part: bytes, count: int, pause: float = 0.0) -> int:
    """How many parts could be sent."""
    for number in range(count):
        try:
            connection.sendall(part)
        except OSError:
            return number
        time.sleep(pause)
    return count


@pytest.mark.parametrize(
    ("begin", "part"),
    [
        ("GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", "x" * 1000),  # one header
        ("GET /health HTTP/1.1\r\nHost: localhost\r\n", "X-Name: x\r\n" * 100),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\nX: x", "\r\n x" * 200),  # folded
        ("GET /", "x" * 1000),
        ("", "x" * 1000),
        (CHUNKED + "5;", "x" * 1000),  # an extension of a chunk
        (CHUNKED + "0\r\n", "X-Name: x\r\n" * 100),  # trailers
    ],
)
def test_heads_without_end(shared: Running, begin: str, part: str) -> None:
    with connected(shared.port, begin) as connection:
        assert sent(connection, part.encode(), 40) == 40
        status, headers, content = received(connection, "GET")
    assert (status, headers["connection"]) == (431, "close")
    assert "its head has more than 16384 bytes" in message((status, headers, content))


@pytest.mark.parametrize("size", [15_000, 40_000, 200_000])
def test_a_long_head_at_once(shared: Running, size: int) -> None:
    head = f"GET /health HTTP/1.1\r\nHost: localhost\r\nX: {'x' * size}\r\n\r\n"
    assert exchange(shared.port, head)[0] == (200 if size < 16_000 else 431)


def test_a_head_of_any_length_takes_no_memory(shared: Running) -> None:
    """150 MB of one header took 285 MB and 13 seconds."""
    before, start = resident(), time.monotonic()
    with connected(shared.port, "GET /health HTTP/1.1\r\nHost: localhost\r\nX: ") as connection:
        assert sent(connection, b"x" * 1_000_000, 150) < 150 or time.monotonic() - start < 5
    assert resident() - before < 30e6


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nX: \0\r\n\r\n", 400),
        (HEAD + "Transfer-Encoding: gzip\r\n\r\n", 501),
        (HEAD + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
        (HEAD + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (HEAD + "Content-Length: -1\r\n\r\n", 400),
        (HEAD + f"Content-Length: {'9' * 30}\r\n\r\n", 400),
        (HEAD + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (CHUNKED + "x\r\n", 400),
        (CHUNKED + "-1\r\n", 400),
        (CHUNKED + f"{'f' * 30}\r\n", 400),
        (CHUNKED + "2\r\n{}xx", 400),
        (HEAD + "Expect: 100-continue\r\nContent-Length: 8000001\r\n\r\n", 413),
        (HEAD + "Content-Length: 8000001\r\n\r\n", 413),
        (HEAD + f"Content-Length: {'9' * 19}\r\n\r\n", 413),
        (CHUNKED + "fffffff\r\n" + "x" * 8_000_001, 413),
    ],
)
def test_what_is_refused(shared: Running, request_: str, status: int) -> None:
    """After the head, or as soon as it is wrong; lengths by their announcement."""
    start = time.monotonic()
    answer = exchange(shared.port, request_)
    assert answer[0] == status
    assert message(answer)
    assert time.monotonic() - start < 5
    assert shared.send("/health")[0] == 200


def test_a_body_that_is_too_long_is_heard_by_who_sends_it(shared: Running) -> None:
    """The answer comes though the client sends all before it reads."""
    for head, part in (
        (HEAD + "Content-Length: 30000000\r\n\r\n", b"x" * 100_000),
        (CHUNKED, b"186a0\r\n" + b"x" * 100_000 + b"\r\n"),
    ):
        with connected(shared.port, head) as connection:
            assert sent(connection, part, 300) == 300
            assert received(connection, "POST")[0] == 413


@pytest.mark.parametrize(
    ("begin", "status"),
    [
        ("", 0),
        ("G", 408),
        ("GET /health HTTP/1.1\r\n", 408),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", 408),
        (HEAD + "Content-Length: 200000\r\n\r\n", 408),
        (HEAD + "Content-Length: 200000\r\n\r\n{", 408),
        (CHUNKED, 408),
        (CHUNKED + "1\r\n{\r\n", 408),
        (CHUNKED + "2\r\n{}\r\n0\r\nX: ", 408),  # trailers
    ],
)
@pytest.mark.parametrize("drips", [False, True])
def test_what_stops_coming(quick: Running, begin: str, status: int, drips: bool) -> None:
    """Whether nothing more comes, or a byte now and then."""
    start = time.monotonic()
    with connected(quick.port, begin) as connection:
        if drips:
            byte = b"1\r\nx\r\n" if begin.startswith(CHUNKED) and "0" not in begin[-7:] else b"x"
            sender = threading.Thread(target=sent, args=(connection, byte, 100, 0.05))
            sender.start()
        answer = received(connection, "GET")
        assert 0.5 < time.monotonic() - start < 3
        if drips:
            sender.join()
    if begin or not drips:
        assert answer[0] == status
    if answer[0]:
        assert "is not complete" in message(answer)
        assert answer[1]["connection"] == "close"
    until(lambda: quick.send("/health")[0] == 200)


def test_a_connection_ends_after_its_last_request(quick: Running) -> None:
    with connected(quick.port, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert received(connection, "GET")[0] == 200
        assert connection.recv(1) == b""


def test_a_busy_connection_stays(quick: Running) -> None:
    """Each request has its own time, and texts have theirs."""
    head = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    quick.executor.seconds = 0.1
    body = json.dumps(TEXT | {"max_tokens": 20, "ignore_eos": True})
    try:
        with connected(quick.port) as connection:
            start = time.monotonic()
            while time.monotonic() < start + 1.5:
                connection.sendall(head.encode())
                assert received(connection, "GET")[0] == 200
                time.sleep(0.1)
            connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert received(connection, "POST")[0] == 200
            assert time.monotonic() - start > 3
    finally:
        quick.executor.seconds = 0


def test_a_slow_body_that_goes_on_has_its_time(model: moec.LoadedModel) -> None:
    limits = Limits(body_seconds=0.3, slowest=20_000)
    body = json.dumps(TEXT | {"max_tokens": 1}).ljust(30_000)
    with serving(model, limits=limits) as running:
        with connected(running.port, f"{HEAD}Content-Length: {len(body)}\r\n\r\n") as connection:
            for start in range(0, len(body), 2000):
                connection.sendall(body[start : start + 2000].encode())
                time.sleep(0.05)
            assert received(connection, "POST")[0] == 200


def test_the_rest_of_a_refused_request_does_not_stay(quick: Running) -> None:
    """It was answered early, and its body comes byte by byte."""
    head = "POST /none HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with connected(quick.port, head) as connection:
        assert received(connection, "POST")[0] == 415
        start = time.monotonic()
        assert sent(connection, b"x", 100, 0.05) < 40
        assert time.monotonic() - start < 2


def test_many_bodies_together(quick: Running) -> None:
    """Bodies that wait hold no more than all may; short ones are still read."""
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(connected(quick.port, HEAD + "Content-Length: 290000\r\n\r\n"))
            for _ in range(10)
        ]
        for connection in connections:
            sent(connection, b" " * 280_000, 1)
        short = f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n{BODY}"
        assert exchange(quick.port, short)[0] == 200
        answers = [received(connection, "POST") for connection in connections]
    statuses = [answer[0] for answer in answers]
    assert set(statuses) == {408, 503}
    assert statuses.count(408) in (3, 4)  # 1,000,000 bytes of 280,000 - 65,536
    assert {answer[1]["retry-after"] for answer in answers if answer[0] == 503} == {"1"}
    long = BODY.ljust(290_000)
    again = f"{HEAD}Content-Length: {len(long)}\r\n\r\n{long}"
    assert [exchange(quick.port, again)[0] for _ in range(5)] == [200] * 5


def test_a_client_that_does_not_read(quick: Running) -> None:
    """It held its text and its place for ever."""
    body = TEXT | {"max_tokens": 400, "n": 4, "stream": True, "ignore_eos": True, "logprobs": 20}
    content = json.dumps(body)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", quick.port))
        connection.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        until(lambda: quick.service.used == 4)
        until(lambda: quick.service.used == 0)


def test_a_slow_reader_that_goes_on(quick: Running) -> None:
    body = TEXT | {"max_tokens": 100, "n": 4, "stream": True, "ignore_eos": True, "logprobs": 20}
    content = json.dumps(body)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", quick.port))
        connection.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        received, start = b"", time.monotonic()
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(20_000)
            time.sleep(0.02)
        assert time.monotonic() - start > 1.5
    assert b"data: [DONE]" in received


def test_many_connections(model: moec.LoadedModel) -> None:
    """Those that wait for a request longest make room for others; texts go on."""
    limits = Limits(connections=20)
    with serving(model, limits=limits, queue=0) as running, contextlib.ExitStack() as stack:
        running.executor.seconds = 0.02
        body = json.dumps(TEXT | {"max_tokens": 100, "ignore_eos": True})
        text = stack.enter_context(
            connected(running.port, f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}")
        )
        until(lambda: running.service.used)
        idle = [stack.enter_context(connected(running.port)) for _ in range(60)]
        assert running.send("/health")[0] == 200
        assert idle[0].recv(1) == b""
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert received(idle[-1], "GET")[0] == 200
        with ThreadPoolExecutor(30) as pool:
            statuses = [*pool.map(lambda _: running.send("/health")[0], range(90))]
        assert set(statuses) == {200}
        assert received(text, "POST")[0] == 200


def test_pipelined_requests(shared: Running) -> None:
    head = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = "GET /none HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connected(shared.port, head * 500 + last) as connection:
        content = b""
        while part := connection.recv(65_536):
            content += part
    assert content.count(b"HTTP/1.1 200 OK") == 500
    assert content.count(b"HTTP/1.1 404 Not Found") == 1


def test_a_wrong_chunk_after_the_answer_began(shared: Running) -> None:
    """Of a request that was answered without its body."""
    head = "GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(shared.port, head) as connection:
        assert received(connection, "GET")[0] == 200
        connection.sendall(b"x\r\n")
        rest: Any = connection.recv(1000)
    assert rest == b"" or b" 400 " in rest
