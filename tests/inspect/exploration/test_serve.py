"""The server of `moec explore`'s page: who is answered, and for how long."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from moec.inspect.exploration.serve import MOST_THREADS, page_server


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with page_server("<p>page", 0, seconds=0.5) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def answer(port: int, request: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request.encode())
        content = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65_536):
                content += part
        return content


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET / HTTP/1.1\r\nHost: localhost:80", 200),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1", 200),
        ("GET / HTTP/1.0", 403),
        ("GET / HTTP/1.1\r\nHost: attacker.example", 403),
        ("GET / HTTP/1.1\r\nHost: localhost.attacker.example", 403),
        ("GET / HTTP/1.1\r\nHost: attacker.example\r\nHost: localhost", 403),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: attacker.example", 403),
        ("GET http://attacker.example/ HTTP/1.1\r\nHost: localhost", 404),
        ("POST / HTTP/1.1\r\nHost: localhost", 501),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nX: " + "x" * 70_000, 431),
        ("GET / HTTP/1.1\r\nHost: localhost" + "\r\nX: x" * 200, 431),
        ("GET /" + "x" * 70_000, 414),
    ],
)
def test_requests(port: int, head: str, status: int) -> None:
    content = answer(port, head + "\r\n\r\n")
    assert content.split(b" ", 2)[1] == str(status).encode()
    assert content.endswith(b"<p>page") == (status == 200)


def test_a_slow_connection_ends(port: int) -> None:
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        with contextlib.suppress(OSError):
            for byte in b"GET / HTTP/1.1 and much more that comes slowly, for five seconds":
                connection.sendall(bytes([byte]))
                time.sleep(0.08)
    assert 0.4 < time.monotonic() - start < 3  # of the 5 that it takes


def test_connections_are_bounded(port: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        time.sleep(0.2)
        assert threading.active_count() <= MOST_THREADS + 2
    time.sleep(0.6)
    assert answer(port, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").endswith(b"<p>page")
