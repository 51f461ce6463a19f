"""Who may use `moec serve`: names in Host, origins of pages, the key, the type of bodies."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import moec
from moec.serving.access import Access, read_access
from moec.serving.errors import ApiError
from moec.serving.server import listen
from tests.serving.running import TEXT, Running, exchange, process, serving

PAGE = "https://chat.example"
KEY = "ünlocked"
RULES = Access("192.0.2.7", frozenset({"moec_1", "gpu.lan"}), (PAGE, "null"), KEY)
BODY = json.dumps(TEXT | {"max_tokens": 1})
JSON = f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n"


@pytest.fixture(scope="module")
def guarded(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model, access=RULES) as running:
        yield running


def request(line: str, *headers: str, body: str = "") -> str:
    return "\r\n".join([f"{line} HTTP/1.1", *headers, "Connection: close", "", body])


def head(line: str, *headers: str, port: int) -> int:
    return exchange(port, request(line, *headers))[0]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost.:1", 200),  # case, the dot of the root, and the port of a mapping
        ("127.0.0.1", 200),
        ("127.8.9.1:8000", 200),
        ("[::1]:8000", 200),
        ("[0:0::0:1]", 200),
        ("192.0.2.7:80", 200),  # where it listens
        ("moec_1:8000", 200),
        ("GPU.LAN", 200),
        ("192.0.2.8", 421),
        ("0.0.0.0", 421),
        ("[::2]", 421),
        ("attacker.example", 421),
        ("localhost.attacker.example", 421),
        ("localhost:80@attacker.example", 421),
        ("localhost/health?", 421),
        ("127.0.0.1.attacker.example", 421),
        ("127.0.0.1, attacker.example", 421),
        ("gpu.lan..", 421),
        ("[::1", 421),
        ("::1", 421),
        ("", 421),
    ],
)
def test_hosts(guarded: Running, host: str, status: int) -> None:
    answer = exchange(guarded.port, request("GET /health", f"Host: {host}"))
    assert answer[0] == status
    if status == 421:
        error = json.loads(answer[2])["error"]
        assert "is no name of this server: moec serve --allowed-host NAME gives" in error["message"]


def test_there_is_one_host(guarded: Running) -> None:
    two = exchange(guarded.port, request("GET /health", "Host: localhost", "Host: localhost"))
    assert two[0] == 400
    assert exchange(guarded.port, request("GET /health"))[0] == 400
    assert exchange(guarded.port, "GET /health HTTP/1.0\r\n\r\n")[0] == 421
    old = "GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n"
    assert exchange(guarded.port, old)[0] == 200
    line = "GET http://localhost/health"  # a target of another form is no route, whatever Host
    assert (
        head(line, "Host: localhost", f"Authorization: Bearer {utf8(KEY)}", port=guarded.port)
        == 404
    )
    assert head(line, "Host: attacker.example", port=guarded.port) == 421


def test_where_it_listens_says_how_it_is_reached() -> None:
    def answers(host: str, *names: str) -> set[str]:
        with listen(host, 0) as listener:
            rules = read_access(listener, host, names, (), None)
        return {name for name in tried if not refusal(rules, name)}

    tried = {"localhost", "127.0.0.1", "10.1.2.3", "[fd00::1]", socket.gethostname(), "moec", "x.y"}
    local = {"localhost", "127.0.0.1"}
    assert answers("127.0.0.1") == local
    assert answers("localhost") == local
    assert answers("127.0.0.1", "moec:8000") == local | {"moec"}
    # As in a container: by any address and by its own name; pages cannot have these as their names.
    assert answers("0.0.0.0") == tried - {"moec", "x.y"}
    assert answers("0.0.0.0", "moec", "X.Y.") == tried
    assert answers("0.0.0.0", "*") == tried


def refusal(rules: Access, host: str) -> int:
    headers = [(b"host", host.encode())]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    try:
        rules.check(scope)
    except ApiError as error:
        return error.status
    return 0


def utf8(text: str) -> str:
    return text.encode().decode("latin-1")


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (f"Bearer {utf8(KEY)}", 200),
        (f"bearer {utf8(KEY)}", 200),
        (f"BEARER    {utf8(KEY)}", 200),
        (f"Bearer {KEY}", 401),  # in Latin-1
        (f"Bearer{utf8(KEY)}", 401),
        (utf8(KEY), 401),
        (f"Basic {utf8(KEY)}", 401),
        (f"Bearer {utf8(KEY)}x", 401),
        (f"Bearer {utf8(KEY)[:-1]}", 401),
        (f"Bearer {utf8(KEY.upper())}", 401),
        ("Bearer \xff\xfe", 401),
        ("Bearer", 401),
        ("", 401),
    ],
)
def test_keys(guarded: Running, value: str, status: int) -> None:
    line, host = "GET /v1/models", "Host: localhost"
    answer = exchange(guarded.port, request(line, host, f"Authorization: {value}"))
    assert answer[0] == status
    if status == 401:
        assert answer[1]["www-authenticate"] == "Bearer"
        assert json.loads(answer[2])["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/health", 200),
        ("/%68ealth", 200),  # the same path
        ("/ready?x=1", 200),
        ("/", 200),
        ("/health?/v1/models", 200),
        ("/health%2F..%2Fv1/models", 401),
        ("/health/../v1/models", 401),
        ("/health/", 401),
        ("/health;x", 401),
        ("//health", 401),
        ("//", 401),
        ("/HEALTH", 401),
        ("/health%00", 401),
        ("/v1/models?/health", 401),
        ("/v1/models%3F/health", 401),
        ("/v1/models?api_key=%C3%BCnlocked", 401),
        ("/v1/moec/stats", 401),
        ("/metrics", 401),
        ("/openapi.json", 401),
        ("/nothing", 401),
        ("http://localhost/health", 401),
        ("*", 401),
    ],
)
def test_what_needs_no_key(guarded: Running, target: str, status: int) -> None:
    for method in ("GET", "HEAD"):
        assert head(f"{method} {target}", "Host: localhost", port=guarded.port) == status
    # As of starlette 1.0.0, which made a path of it.
    assert head(f"GET {target}", "Host: localhost/health?", port=guarded.port) == 421


def test_no_sockets_of_the_web(guarded: Running) -> None:
    upgrade = ("Host: localhost", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    text = "\r\n".join(
        [
            "GET /v1/models HTTP/1.1",
            *upgrade,
            "Connection: Upgrade, close",
            "Sec-WebSocket-Key: eA==",
        ]
    )
    assert exchange(guarded.port, text + "\r\n\r\n")[0] == 401


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("text/plain;charset=UTF-8", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("text/plain; application/json", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
def test_bodies_are_json(shared: Running, kind: str, status: int) -> None:
    """A page can send the others to anybody, without asking first."""
    headers = "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(BODY)}"
    line = "POST /v1/completions"
    assert exchange(shared.port, request(line, *headers, body=BODY))[0] == status
    if not kind:
        blob = request(line, headers[0], headers[2], body=BODY)  # as of a Blob without a type
        assert exchange(shared.port, blob)[0] == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:81", 200),  # the server's own page, and that behind a proxy with TLS
        ("https://localhost:81", 200),
        ("http://localhost", 403),
        ("http://localhost:82", 403),
        ("http://127.0.0.1:81", 403),
        ("https://attacker.example", 403),
        ("null", 403),
        ("localhost:81", 403),
        ("app://localhost:81", 403),
        ("http://localhost:81.attacker.example", 403),
        ("", 403),
    ],
)
def test_origins(shared: Running, origin: str, status: int) -> None:
    headers = ("Host: localhost:81", f"Origin: {origin}")
    before = shared.metric("generation_tokens_total")
    for line, more, body in (("GET /v1/models", "", ""), ("POST /v1/completions", JSON, BODY)):
        answer = exchange(shared.port, request(line, *headers, *more.splitlines(), body=body))
        assert answer[0] == status
        assert not [name for name in answer[1] if name.startswith("access-control")]
        if status == 403:
            message = json.loads(answer[2])["error"]["message"]
            assert "moec serve --allow-origin ORIGIN lets pages of that origin use" in message
    assert shared.metric("generation_tokens_total") == before + (status == 200)


def test_pages_of_other_origins(guarded: Running) -> None:
    """They read answers, streams and errors; a browser asks before it sends the key."""
    names = "authorization, content-type, x-stainless-os"
    ask = (
        "Access-Control-Request-Method: POST",
        f"Access-Control-Request-Headers: {names}",
        "Access-Control-Request-Private-Network: true",
    )
    for origin in (PAGE, "null"):
        headers = ("Host: localhost", f"Origin: {origin}")
        line = "OPTIONS /v1/completions"
        status, answer, _ = exchange(guarded.port, request(line, *headers, *ask))
        assert status == 200
        assert answer["access-control-allow-origin"] == origin
        assert "POST" in answer["access-control-allow-methods"]
        assert answer["access-control-allow-headers"] == names
        assert answer["access-control-allow-private-network"] == "true"
        assert "Origin" in answer["vary"]
        key = f"Authorization: Bearer {utf8(KEY)}"
        stream = json.dumps(TEXT | {"stream": True})
        for line, more, body, right in (
            ("GET /v1/models", [key], "", 200),
            ("GET /v1/models", [], "", 401),
            ("GET /none", [key], "", 404),
            ("POST /v1/completions", [key, *JSON.split("\r\n")[:2]], BODY, 200),
            ("POST /v1/completions", [key, "Content-Length: 2"], "{}", 415),
            ("POST /v1/completions", [key, JSON.split("\r\n")[0], "Content-Length: 1"], "{", 400),
            (
                "POST /v1/completions",
                [key, JSON.split("\r\n")[0], f"Content-Length: {len(stream)}"], stream, 200,
            ),
        ):  # fmt: skip
            status, answer, _ = exchange(guarded.port, request(line, *headers, *more, body=body))
            assert (status, answer.get("access-control-allow-origin")) == (right, origin)
    for origin in ("https://attacker.example", "https://chat.example:8443", f"{PAGE}.x"):
        foreign = request("OPTIONS /v1/completions", "Host: localhost", f"Origin: {origin}", *ask)
        status, answer, _ = exchange(guarded.port, foreign)
        assert status in (400, 403)
        assert "access-control-allow-origin" not in answer
        get = request("GET /health", "Host: localhost", f"Origin: {origin}")
        status, answer, _ = exchange(guarded.port, get)
        assert status == 403
        assert "access-control-allow-origin" not in answer


def test_all_pages_where_it_says_so(path: Path) -> None:
    options = ("--allow-origin", "*", "--allowed-host", "*", "--threads", "1")
    with process(path, *options) as (_, port):
        page = request("GET /v1/models", "Host: any.example", f"Origin: {PAGE}")
        status, answer, _ = exchange(port, page)
    assert (status, answer["access-control-allow-origin"]) == (200, "*")
